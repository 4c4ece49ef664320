//! Kubernetes' RuntimeClass objects.

use caisson_config_service::keys;

use super::runtimes::Runtime;

/// The manifest of `runtime`.
pub(super) fn manifest(runtime: &Runtime) -> String {
    let what = match runtime.hypervisor {
        Some(hypervisor) => format!("Pods in virtual machines by {hypervisor}"),
        None => "Pods in virtual machines, by the hypervisor that the node's configuration chooses".to_owned(),
    };
    let (handler, memory) = (&runtime.handler, guest_memory_mib());
    format!(
        "# {what}.\n\
         apiVersion: node.k8s.io/v1\n\
         kind: RuntimeClass\n\
         metadata:\n  name: {handler}\n\
         handler: {handler}\n\
         # A virtual machine has this much (default_memory) on top of its containers' limits.\n\
         overhead:\n  podFixed:\n    memory: {memory}Mi\n"
    )
}

/// What a guest takes for itself, unless the configuration says otherwise.
fn guest_memory_mib() -> u64 {
    let default = keys::HYPERVISOR.iter().find(|key| key.name == "default_memory").map(|key| key.default);
    default.and_then(|default| default.parse().ok()).unwrap_or(256)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_names_its_handler_twice() {
        let runtime =
            Runtime { handler: "caisson-fc".into(), hypervisor: Some("firecracker"), config_path: None, shim: None };
        let expected = "\
# Pods in virtual machines by firecracker.
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: caisson-fc
handler: caisson-fc
# A virtual machine has this much (default_memory) on top of its containers' limits.
overhead:
  podFixed:
    memory: 256Mi
";
        assert_eq!(manifest(&runtime), expected);
    }
}
