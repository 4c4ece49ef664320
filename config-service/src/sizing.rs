//! How large a pod's sandbox has to be, by what containerd's CRI plugin says of the whole pod.
//!
//! A container that is started without Kubernetes has its limits in its specification, which the shim adds.

use std::collections::HashMap;

use caisson_protocol::vmm::VmConfig;

use crate::{
    keys::host_cpus,
    problem::{Place, Problem, quote},
};

/// Microseconds of CPU time that the pod may use in a period; 0 or less is without a limit.
const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// Microseconds.
const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// Bytes; 0 or less is without a limit.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const MIB: u64 = 1 << 20;

/// Makes `vm` as large as the pod may become: as many vCPUs as its CPU limit allows, though no more than the host has,
/// and memory for its limit beside what the guest itself needs.
///
/// # Errors
/// What exceeds the configured maxima, or makes no sense.
pub(crate) fn size(vm: &mut VmConfig, annotations: &HashMap<String, String>) -> Result<(), Vec<Problem>> {
    let found = [vcpus(vm, annotations), memory(vm, annotations)];
    let problems: Vec<_> = found.into_iter().filter_map(Result::err).collect();
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn vcpus(vm: &mut VmConfig, annotations: &HashMap<String, String>) -> Result<(), Problem> {
    let quota = limit(annotations, QUOTA)?;
    let period = limit(annotations, PERIOD)?;
    let (Some(quota), Some(period)) = (quota, period) else { return Ok(()) };
    let wanted = u32::try_from(quota.div_ceil(period)).unwrap_or(u32::MAX).min(host_cpus());
    if vm.max_vcpus != 0 && wanted > vm.max_vcpus {
        let text = format!("the pod's limit is {wanted} CPUs, default_maxvcpus allows {}", vm.max_vcpus);
        return Err(problem(QUOTA, text));
    }
    vm.vcpus = vm.vcpus.max(wanted);
    Ok(())
}

fn memory(vm: &mut VmConfig, annotations: &HashMap<String, String>) -> Result<(), Problem> {
    let Some(bytes) = limit(annotations, MEMORY)? else { return Ok(()) };
    let wanted = vm.memory_mib.saturating_add(bytes.div_ceil(MIB));
    if vm.max_memory_mib != 0 && wanted > vm.max_memory_mib {
        let text = format!(
            "the pod's limit and default_memory are {wanted} MiB together, default_maxmemory allows {}",
            vm.max_memory_mib
        );
        return Err(problem(MEMORY, text));
    }
    vm.memory_mib = wanted;
    Ok(())
}

/// A number above 0; none when the pod has no limit.
fn limit(annotations: &HashMap<String, String>, name: &str) -> Result<Option<u64>, Problem> {
    let Some(text) = annotations.get(name).filter(|text| !text.starts_with('-')) else { return Ok(None) };
    let number: u64 =
        text.parse().map_err(|_| problem(name, format!("found {}, expected a whole number", quote(text))))?;
    Ok((number != 0).then_some(number))
}

fn problem(name: &str, text: String) -> Problem {
    Problem::at(Place::Annotation(name.into()), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(annotations: &[(&str, &str)], vm: VmConfig) -> Result<(u32, u64), String> {
        let annotations = annotations.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        let mut vm = VmConfig { vcpus: 1, memory_mib: 256, ..vm };
        match size(&mut vm, &annotations) {
            Ok(()) => Ok((vm.vcpus, vm.memory_mib)),
            Err(problems) => Err(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")),
        }
    }

    #[test]
    fn a_part_of_a_cpu_is_rounded_up_and_memory_is_added() {
        let told = sized(&[(QUOTA, "50000"), (PERIOD, "100000"), (MEMORY, "134217729")], VmConfig::new());
        assert_eq!(told, Ok((1, 256 + 129)));
    }

    #[test]
    fn no_more_vcpus_than_the_host_has_cpus() {
        let told = sized(&[(QUOTA, "100000000000"), (PERIOD, "100000")], VmConfig::new());
        assert_eq!(told, Ok((host_cpus(), 256)));
    }

    #[test]
    fn a_pod_without_limits_gets_what_is_configured() {
        let told = sized(&[(QUOTA, "-1"), (PERIOD, "100000"), (MEMORY, "0")], VmConfig::new());
        assert_eq!(told, Ok((1, 256)));
    }

    #[test]
    fn a_pod_larger_than_the_maximum_is_refused() {
        let told = sized(&[(MEMORY, "1073741824")], VmConfig { max_memory_mib: 512, ..VmConfig::new() });
        let text = "annotation io.kubernetes.cri.sandbox-memory: the pod's limit and default_memory are 1280 MiB \
                    together, default_maxmemory allows 512";
        assert_eq!(told, Err(text.into()));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let told = sized(&[(MEMORY, "1Gi"), (QUOTA, "many"), (PERIOD, "100000")], VmConfig::new());
        let text = "annotation io.kubernetes.cri.sandbox-cpu-quota: found \"many\", expected a whole number; \
                    annotation io.kubernetes.cri.sandbox-memory: found \"1Gi\", expected a whole number";
        assert_eq!(told, Err(text.into()));
    }
}
