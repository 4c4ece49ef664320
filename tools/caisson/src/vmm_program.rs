//! Which hypervisor program a configuration names.

use caisson_protocol::config::SandboxConfig;

/// None when that is left to the launcher.
pub(crate) fn path(config: &SandboxConfig) -> Option<&str> {
    let vm = config.vm.as_ref()?;
    (!vm.hypervisor_path.is_empty()).then_some(vm.hypervisor_path.as_str())
}
