//! What a virtual machine is born with, and what its guest is told first.

use std::{fs, path::PathBuf, time::SystemTime};

use caisson_protocol::{
    config::{BlockRootfs, SandboxConfig, SharedFs},
    guest::{SetupRequest, Storage},
    paths::{GUEST_SHARED_DIR, SHARED_TAG, SandboxDir},
    vmm::{Console, CreateRequest, Device, Fs, Rng, VmConfig, Vsock, device::Kind},
};
use protobuf::MessageField;

use crate::vm::Needs;

/// The id of the device that the guest calls the host by.
pub const VSOCK_DEVICE: &str = "vsock";

/// Has the guest's kernel not wait for timer ticks where it waits for its other processors, which mounts, namespaces and control
/// groups do: Documentation/admin-guide/kernel-parameters.txt.
const EXPEDITED: &str = "rcupdate.rcu_expedited=1";

/// For the launcher. `disks` are the first container's.
pub fn create_request(config: SandboxConfig, needs: &Needs, disks: Vec<Device>, dir: &SandboxDir) -> CreateRequest {
    let configured = config.vm.unwrap_or_default();
    let mut devices = vec![
        device("console", Kind::Console(Console { log: text(dir.console_log()), ..Default::default() })),
        device(VSOCK_DEVICE, Kind::Vsock(Vsock { socket: text(dir.vsock_socket()), ..Default::default() })),
        device("rng", Kind::Rng(Rng { source: "/dev/urandom".into(), ..Default::default() })),
    ];
    devices.extend(config.shared_fs.into_option().map(|shared| shared_directory(shared, dir)));
    devices.extend(disks);
    let vm = VmConfig {
        vcpus: configured.vcpus.max(needs.vcpus),
        memory_mib: configured.memory_mib + needs.memory_mib,
        // The last of two counts: nobody allows a console by `kernel_params`.
        kernel_params: format!(
            "{EXPEDITED} {} caisson.log={} caisson.console={}",
            configured.kernel_params,
            config.log_level,
            u8::from(config.debug_console)
        )
        .trim()
        .to_owned(),
        devices,
        spare_disks: config.block_rootfs.as_ref().map_or(0, |block| spare_disks(block, needs)),
        ..configured
    };
    CreateRequest {
        run_dir: text(dir.launcher()),
        vm: MessageField::some(vm),
        options: config.options,
        state_dir: text(dir.path().to_owned()),
        ..Default::default()
    }
}

/// For the agent.
pub fn setup_request(needs: &Needs, shares_directory: bool) -> SetupRequest {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let shared = Storage {
        driver: "virtio-fs".into(),
        source: SHARED_TAG.into(),
        mount_point: GUEST_SHARED_DIR.into(),
        ..Default::default()
    };
    SetupRequest {
        hostname: needs.hostname.clone(),
        storages: shares_directory.then_some(shared).into_iter().collect(),
        time_unix_ns: now.as_nanos() as i64,
        entropy: entropy(),
        ..Default::default()
    }
}

fn device(id: &str, kind: Kind) -> Device {
    Device { id: id.into(), kind: Some(kind), ..Default::default() }
}

fn shared_directory(shared: SharedFs, dir: &SandboxDir) -> Device {
    let SharedFs { daemon_path, cache, extra_args, .. } = shared;
    let (tag, shared_dir) = (SHARED_TAG.into(), text(dir.shared()));
    device("shared", Kind::Fs(Fs { tag, shared_dir, daemon_path, cache, extra_args, ..Default::default() }))
}

/// For as many as two more containers with an image of their own, as most pods have at most.
fn spare_disks(block: &BlockRootfs, needs: &Needs) -> u32 {
    if needs.more_containers { 2 * block.max_disks } else { 0 }
}

/// 32 bytes from the host's generator; none when it cannot be read, which costs the guest only a second source.
fn entropy() -> Vec<u8> {
    use std::io::Read;
    let mut bytes = vec![0; 32];
    match fs::File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes)) {
        Ok(()) => bytes,
        Err(_) => Vec::new(),
    }
}

fn text(path: PathBuf) -> String {
    path.to_string_lossy().into_owned()
}
