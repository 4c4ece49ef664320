//! `caisson hypervisor`: which there are, what they can do here, and which one new sandboxes get.

mod features;
pub(crate) mod known;
mod list;
mod show;
mod switch;

use caisson_config_service::{installation::Installation, switch::Listed};
use clap::Subcommand;

use crate::output::Format;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the hypervisors: which are installed, and what works with each on this machine.
    #[command(after_help = "Examples:
  caisson hypervisor list
  caisson hypervisor list --json | jq '.[] | select(.launcher) | .name'")]
    List,
    /// Show one hypervisor: where its program is, what it can do here as it is configured and why not, and its option keys.
    #[command(after_help = "Examples:
  caisson hypervisor show qemu
  caisson hypervisor show fc --json")]
    Show {
        /// qemu, cloud-hypervisor (clh), firecracker (fc), builtin (dragonball), stratovirt or acrn.
        name: String,
    },
    /// Choose the hypervisor of new sandboxes. Running ones keep theirs.
    ///
    /// Makes the configuration a symbolic link to the hypervisor's own file, after checking that one; in one step, so
    /// that every sandbox gets either the old or the new one.
    #[command(after_help = "Examples:
  caisson hypervisor use qemu
  caisson hypervisor use fc --config /etc/caisson/configuration-fc.toml
  caisson hypervisor use --previous          undo the last change")]
    Use(switch::Arguments),
}

pub(crate) async fn run(command: Command, format: Format) -> anyhow::Result<()> {
    let installation = Installation::of_this_program();
    match command {
        Command::List => list::run(installation, format).await,
        Command::Show { name } => show::run(installation, &name, format).await,
        Command::Use(arguments) => switch::run(installation, arguments, format).await,
    }
}

/// Of all `listed` configurations the one that tells how sandboxes of the hypervisor `name` are made: the one in force, or
/// else one that could be.
fn configuration_of<'a>(listed: &'a [Listed], name: &str) -> Option<&'a Listed> {
    let of_it = listed.iter().filter(|listed| listed.hypervisor.as_deref() == Some(name));
    of_it.min_by_key(|listed| (!listed.in_force, !listed.problems.is_empty()))
}
