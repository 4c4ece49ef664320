//! What every hypervisor's `Create` has in common: a request is checked once, here, before anything is started.

use std::{collections::HashSet, fs::File, path::Path};

use caisson_protocol::vmm::{CreateRequest, Device, Net, VmConfig, device::Kind};

use crate::{Error, Result, huge_pages, hypervisor::Hypervisor, tap, vfio, virtiofsd::CACHE_MODES};

/// `Vsock.socket` leaves room for `_<port>` in a socket address, `unix(7)`.
const MAX_VSOCK_PATH: usize = 96;
/// `Device.id`, so that it fits a disk's serial number.
const MAX_DEVICE_ID: usize = 20;
/// virtio-fs tags, virtio 1.2 §5.11.4.
const MAX_TAG: usize = 36;
/// `MAX_TAP_QUEUES`, drivers/net/tun.c.
const MAX_QUEUE_PAIRS: u32 = 256;
/// No kernel boots with less.
const MIN_MEMORY_MIB: u64 = 16;
/// The physical addresses of x86-64: 52 bits.
const MAX_MEMORY_MIB: u64 = 1 << 32;

/// A device's kind by its field name in `vmm.proto`.
pub fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Block(_) => "block",
        Kind::Net(_) => "net",
        Kind::Vsock(_) => "vsock",
        Kind::Fs(_) => "fs",
        Kind::Vfio(_) => "vfio",
        Kind::Pmem(_) => "pmem",
        Kind::Balloon(_) => "balloon",
        Kind::Rng(_) => "rng",
        Kind::Console(_) => "console",
        // Generated enums may grow.
        _ => "unknown",
    }
}

/// `device`'s kind.
///
/// # Errors
/// When it has none.
pub fn kind(device: &Device) -> Result<&Kind> {
    device.kind.as_ref().ok_or_else(|| Error::Invalid(format!("device \"{}\" has no kind", device.id)))
}

/// Refuses what `H` does not give a VM, and makes `vm` what it can be had as.
///
/// # Errors
/// [`Error::Unsupported`], or what the host lacks.
pub(crate) fn prepare<H: Hypervisor>(vm: Option<&mut VmConfig>) -> Result<()> {
    let Some(vm) = vm else { return Ok(()) };
    if vm.confidential_guest {
        return Err(Error::Unsupported(format!("confidential guests are not supported with {}", H::NAME)));
    }
    huge_pages::prepare::<H>(vm)
}

/// Checks what does not depend on the hypervisor. `max_vcpus` is the hypervisor's limit.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::File`], naming the field.
pub fn check(request: &CreateRequest, max_vcpus: u32) -> Result<&VmConfig> {
    let vm = request.vm.as_ref().ok_or_else(|| Error::Invalid("the request has no VM configuration".into()))?;
    absolute("run_dir", &request.run_dir)?;
    if !Path::new(&request.run_dir).is_dir() {
        return Err(Error::Invalid(format!("run_dir {} is not a directory", request.run_dir)));
    }
    readable("hypervisor", &vm.hypervisor_path)?;
    readable("guest kernel", &vm.kernel)?;
    match (vm.initrd.is_empty(), vm.image.is_empty()) {
        (false, false) => return Err(Error::Invalid("a VM has an initrd or an image, not both".into())),
        (false, true) => readable("initrd", &vm.initrd)?,
        (true, false) => readable("guest image", &vm.image)?,
        (true, true) => {}
    }
    check_size(vm, max_vcpus)?;
    let mut ids = HashSet::new();
    for device in &vm.devices {
        check_device(device)?;
        if !ids.insert(device.id.as_str()) {
            return Err(Error::Invalid(format!("two devices are called \"{}\"", device.id)));
        }
    }
    for single in ["vsock", "console", "balloon"] {
        if vm.devices.iter().filter_map(|device| device.kind.as_ref()).filter(|kind| kind_name(kind) == single).count()
            > 1
        {
            return Err(Error::Invalid(format!("a VM has at most one {single} device")));
        }
    }
    Ok(vm)
}

fn check_size(vm: &VmConfig, max_vcpus: u32) -> Result<()> {
    if !(1..=max_vcpus).contains(&vm.vcpus) {
        return Err(Error::Invalid(format!("{} vCPUs cannot be had: 1 to {max_vcpus}", vm.vcpus)));
    }
    if vm.max_vcpus != 0 && !(vm.vcpus..=max_vcpus).contains(&vm.max_vcpus) {
        return Err(Error::Invalid(format!("max_vcpus {} is out of range: {} to {max_vcpus}", vm.max_vcpus, vm.vcpus)));
    }
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&vm.memory_mib) {
        return Err(Error::Invalid(format!(
            "{} MiB of memory cannot be had: {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
            vm.memory_mib
        )));
    }
    if vm.max_memory_mib != 0 && !(vm.memory_mib..=MAX_MEMORY_MIB).contains(&vm.max_memory_mib) {
        return Err(Error::Invalid(format!(
            "max_memory_mib {} is out of range: {} to {MAX_MEMORY_MIB}",
            vm.max_memory_mib, vm.memory_mib
        )));
    }
    Ok(())
}

/// Checks one device.
///
/// # Errors
/// As for [`check`].
pub fn check_device(device: &Device) -> Result<()> {
    let id = &device.id;
    let well_formed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if id.is_empty() || id.len() > MAX_DEVICE_ID || !id.bytes().all(well_formed) {
        return Err(Error::Invalid(format!(
            "device id \"{}\" is not 1 to {MAX_DEVICE_ID} of a-z, 0-9 and '-'",
            id.escape_debug()
        )));
    }
    match kind(device)? {
        Kind::Block(block) => readable("disk", &block.path),
        Kind::Net(net) => check_net(net),
        Kind::Vsock(vsock) => {
            absolute("the vsock socket", &vsock.socket)?;
            if vsock.socket.len() > MAX_VSOCK_PATH {
                return Err(Error::Invalid(format!(
                    "the vsock socket {} is too long: {} bytes, at most {MAX_VSOCK_PATH}",
                    vsock.socket,
                    vsock.socket.len()
                )));
            }
            Ok(())
        }
        Kind::Fs(fs) => {
            if fs.tag.is_empty()
                || fs.tag.len() > MAX_TAG
                || !fs.tag.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',')
            {
                return Err(Error::Invalid(format!(
                    "virtio-fs tag \"{}\" is not 1 to {MAX_TAG} printable characters without ','",
                    fs.tag.escape_debug()
                )));
            }
            if !fs.cache.is_empty() && !CACHE_MODES.contains(&fs.cache.as_str()) {
                return Err(Error::Invalid(format!(
                    "cache mode \"{}\" of share \"{}\" is none of {}",
                    fs.cache.escape_debug(),
                    fs.tag,
                    CACHE_MODES.join(", ")
                )));
            }
            absolute("shared_dir", &fs.shared_dir)?;
            if !Path::new(&fs.shared_dir).is_dir() {
                return Err(Error::Invalid(format!("shared_dir {} is not a directory", fs.shared_dir)));
            }
            // Who needs the daemon looks at it.
            Ok(())
        }
        Kind::Vfio(vfio) => vfio::check_address(&vfio.address),
        Kind::Pmem(pmem) => readable("pmem image", &pmem.path),
        Kind::Rng(rng) => readable("source of entropy", &rng.source),
        Kind::Console(console) => absolute("the console log", &console.log),
        _ => Ok(()),
    }
}

fn check_net(net: &Net) -> Result<()> {
    let (tap, mac) = (net.tap.as_str(), net.mac.as_str());
    // IFNAMSIZ, net/if.h.
    if tap.is_empty() || tap.len() > 15 || tap.bytes().any(|byte| !byte.is_ascii_graphic() || b"/,=".contains(&byte)) {
        return Err(Error::Invalid(format!("\"{}\" is not a network interface's name", tap.escape_debug())));
    }
    tap::must_exist(tap)?;
    if net.queue_pairs > MAX_QUEUE_PAIRS {
        return Err(Error::Invalid(format!(
            "{tap} cannot have {} queue pairs: at most {MAX_QUEUE_PAIRS}",
            net.queue_pairs
        )));
    }
    let octets: Vec<_> = mac.split(':').collect();
    if octets.len() != 6 || octets.iter().any(|octet| octet.len() != 2 || u8::from_str_radix(octet, 16).is_err()) {
        return Err(Error::Invalid(format!(
            "mac address \"{}\" is not of the form aa:bb:cc:dd:ee:ff",
            mac.escape_debug()
        )));
    }
    Ok(())
}

fn absolute(what: &str, path: &str) -> Result<()> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(())
    } else {
        Err(Error::Invalid(format!("{what} \"{}\" is not an absolute path", path.escape_debug())))
    }
}

/// Checks that a file is there for the launcher.
pub(crate) fn readable(what: &'static str, path: &str) -> Result<()> {
    absolute(what, path)?;
    match File::open(path) {
        Ok(_) => Ok(()),
        Err(source) => Err(Error::File { what, path: path.into(), source }),
    }
}

#[cfg(test)]
mod tests {
    use caisson_protocol::vmm::{Fs, Vsock};

    use super::*;

    fn request() -> CreateRequest {
        let vm = VmConfig {
            hypervisor_path: "/bin/sh".into(),
            kernel: "/bin/sh".into(),
            vcpus: 1,
            memory_mib: 256,
            ..Default::default()
        };
        CreateRequest { run_dir: "/tmp".into(), vm: Some(vm).into(), ..Default::default() }
    }

    fn refusal(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut request = request();
        change(request.vm.as_mut().unwrap());
        caisson_protocol::status::sentence(&check(&request, 32).unwrap_err())
    }

    fn with_device(id: &str, kind: Kind) -> impl FnOnce(&mut VmConfig) {
        let device = Device { id: id.into(), kind: Some(kind), ..Default::default() };
        move |vm| vm.devices.push(device)
    }

    #[test]
    fn a_small_vm_is_accepted() {
        assert!(check(&request(), 32).is_ok());
    }

    #[test]
    fn a_missing_kernel_is_named() {
        assert_eq!(
            refusal(|vm| vm.kernel = "/no/k".into()),
            "open the guest kernel /no/k: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_missing_initrd_is_named() {
        assert!(refusal(|vm| vm.initrd = "/no/i".into()).starts_with("open the initrd /no/i: "));
    }

    #[test]
    fn a_relative_kernel_is_refused() {
        assert_eq!(refusal(|vm| vm.kernel = "vmlinuz".into()), "guest kernel \"vmlinuz\" is not an absolute path");
    }

    #[test]
    fn no_memory_is_refused_with_the_limits() {
        assert_eq!(refusal(|vm| vm.memory_mib = 0), "0 MiB of memory cannot be had: 16 to 4294967296");
    }

    #[test]
    fn too_many_vcpus_are_refused_with_the_limits() {
        assert_eq!(refusal(|vm| vm.vcpus = 33), "33 vCPUs cannot be had: 1 to 32");
    }

    #[test]
    fn a_device_id_that_is_no_serial_number_is_refused() {
        let kind = Kind::Vsock(Vsock { socket: "/s".into(), ..Default::default() });
        assert!(refusal(with_device("Disk,x=y", kind)).starts_with("device id \"Disk,x=y\" is not"));
    }

    #[test]
    fn a_vsock_path_without_room_for_a_port_is_refused() {
        let kind = Kind::Vsock(Vsock { socket: format!("/{}", "s".repeat(96)), ..Default::default() });
        assert!(refusal(with_device("vsock", kind)).ends_with("is too long: 97 bytes, at most 96"));
    }

    #[test]
    fn a_tag_that_would_be_a_hypervisor_argument_is_refused() {
        let kind = Kind::Fs(Fs { tag: "a,cache=x".into(), ..Default::default() });
        assert!(refusal(with_device("fs", kind)).starts_with("virtio-fs tag \"a,cache=x\""));
    }

    #[test]
    fn a_tap_that_does_not_exist_is_named() {
        let kind = Kind::Net(Net { tap: "notap9".into(), mac: "02:00:00:00:00:01".into(), ..Default::default() });
        assert!(refusal(with_device("net", kind)).starts_with("there is no network interface notap9: "));
    }
}
