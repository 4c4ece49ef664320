//! `image-builder`: the command line of this crate. Reads arguments, calls the library, prints what was made.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use image_builder::build::Report;
use image_builder::cache::Cache;
use image_builder::progress::Progress;
use image_builder::recipe::Recipe;
use image_builder::verity::{self, Verity};
use image_builder::{Request, Result, Target, build};

/// Builds guest kernels, root filesystems and initrds; same inputs, same bytes.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build artifacts, or take them from the cache
    Build {
        /// What to build
        #[arg(value_enum)]
        target: TargetName,
        /// What to build it from (TOML); built-in defaults when left out
        #[arg(long, value_name = "FILE")]
        manifest: Option<PathBuf>,
        /// Where the artifacts and manifest.json go
        #[arg(long, value_name = "DIR", default_value = "guest")]
        output: PathBuf,
        /// Where finished work is kept [default: $CAISSON_CACHE/images or /var/cache/caisson/images]
        #[arg(long, value_name = "DIR")]
        cache: Option<PathBuf>,
        /// The guest agent, a static program [default: in the workspace's target directory, or beside image-builder]
        #[arg(long, value_name = "PATH")]
        agent: Option<PathBuf>,
    },
    /// Make the dm-verity hash tree of an image, in FILE.verity
    Verity {
        /// The image; its size must be a multiple of 4096 bytes
        file: PathBuf,
        /// Append the tree to the image instead (padding it to whole blocks)
        #[arg(long)]
        append: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum TargetName {
    Kernel,
    Rootfs,
    Initrd,
    All,
}

fn main() -> ExitCode {
    let progress = Progress::visible();
    let result = run(Arguments::parse(), &progress);
    progress.done();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("image-builder: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments, progress: &Progress) -> Result<()> {
    match arguments.command {
        Command::Build { target, manifest, output, cache, agent } => {
            let recipe = manifest.as_deref().map(Recipe::load).transpose()?.unwrap_or_default();
            let cache = cache.unwrap_or_else(Cache::default_root);
            let request = Request { target: target.into(), recipe, output, cache, agent };
            let report = build(&request, progress)?;
            progress.done();
            print(&request, &report);
            Ok(())
        }
        Command::Verity { file, append } => {
            progress.step(format!("hashing {}", file.display()));
            let hash_file = if append { file.clone() } else { beside(&file) };
            let made = if append { verity::append(&file)? } else { verity::write_beside(&file, &hash_file)? };
            progress.done();
            println!("hash tree    {} at byte {}", hash_file.display(), made.hash_offset);
            print_verity(&made);
            Ok(())
        }
    }
}

fn beside(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".verity");
    name.into()
}

fn print_verity(verity: &Verity) {
    println!("root hash    {}", verity.root_hash);
    println!("salt         {}", verity.salt);
    println!("data blocks  {}", verity.data_blocks);
}

/// One line for each artifact: name, size, digest, whether it was in the cache.
fn print(request: &Request, report: &Report) {
    for (artifact, reused) in &report.artifacts {
        let path = request.output.join(&artifact.name);
        let origin = if *reused { "cached" } else { "built" };
        let size = indicatif::HumanBytes(artifact.size).to_string();
        println!("{:<40} {size:>10}  sha256:{}  {origin}", path.display(), artifact.sha256);
    }
    if let Some(verity) = &report.verity {
        print_verity(verity);
    }
}

impl From<TargetName> for Target {
    fn from(name: TargetName) -> Self {
        match name {
            TargetName::Kernel => Self::Kernel,
            TargetName::Rootfs => Self::Rootfs,
            TargetName::Initrd => Self::Initrd,
            TargetName::All => Self::All,
        }
    }
}
