//! A guest's first process for the boot test: loads the modules in the order that the initrd gives, prints the
//! filesystems that the kernel then has, and powers off. Compiled by the test with `rustc`, statically; no crate.

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::{self, File};
use std::os::fd::AsRawFd;

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn reboot(command: c_int) -> c_int;
}

const SYS_FINIT_MODULE: c_long = 313;
const RB_POWER_OFF: c_int = 0x4321_fedc_u32 as c_int;

fn main() {
    mount_at("proc", "/proc");
    mount_at("sysfs", "/sys");
    mount_at("devtmpfs", "/dev");
    let order = fs::read_to_string("/lib/modules/order").unwrap_or_default();
    for path in order.lines() {
        load(path);
    }
    for line in fs::read_to_string("/proc/filesystems").unwrap_or_default().lines() {
        println!("guest: filesystem {}", line.trim_start_matches("nodev").trim());
    }
    for entry in fs::read_dir("/sys/bus/virtio/drivers").into_iter().flatten().flatten() {
        println!("guest: driver {}", entry.file_name().to_string_lossy());
    }
    println!("guest: vsock {}", fs::exists("/dev/vsock").unwrap_or(false));
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    println!("guest: done after {}", uptime.trim());
    // SAFETY: no memory is passed; the process has nothing left to do.
    unsafe { reboot(RB_POWER_OFF) };
}

fn load(path: &str) {
    let Ok(file) = File::open(path) else {
        println!("guest: missing {path}");
        return;
    };
    // SAFETY: the descriptor is open for the call, the parameter string is a terminated constant.
    let result = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result != 0 {
        println!("guest: cannot load {path}: {}", std::io::Error::last_os_error());
    }
}

fn mount_at(kind: &str, target: &str) {
    let (kind, target) = (CString::new(kind).unwrap_or_default(), CString::new(target).unwrap_or_default());
    // SAFETY: all strings are terminated and live through the call.
    unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}
