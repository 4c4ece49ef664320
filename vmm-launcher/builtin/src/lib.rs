//! The built-in virtual machine monitor: KVM, and our own virtio devices, in the launcher's own process.
//!
//! ```text
//!  main thread (tokio): the Vmm contract ──► Builtin ──► Machine: pause, resume, end
//!  vCPU threads:  KVM_RUN ──exit──► Bus ──► serial port, power registers, virtio transports
//!  device thread: one epoll loop ──► virtio transports' queues and descriptors, serial input
//! ```
//!
//! A VM is quickest understood from [`builder::build_vm`].

pub mod builder;
pub mod hypervisor;
pub mod machine;

pub mod arch;
pub mod bus;
pub mod devices;
pub mod ending;
pub mod event_loop;
pub mod memory;
pub mod options;
pub mod power;
pub mod seccomp;
pub mod serial;
pub mod vcpu;
pub mod virtio;
