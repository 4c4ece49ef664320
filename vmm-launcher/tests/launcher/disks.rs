//! What a guest reads from its disks and writes to them, and what the host does to them meanwhile.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use caisson_protocol::{
    status::Code,
    vmm::{Block, ExitReason, Pmem, device::Kind},
};
use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, unshare},
};

use crate::{
    fixture::{Backend, Images, Launcher, device, for_backend, for_each_backend, text},
    integrity::{assert_all_arrived, ended, little_mib, mib, request},
    pattern,
};

for_each_backend!(a_disk_keeps_every_byte);
for_backend!(
    qemu_only,
    Qemu,
    a_full_host_gives_the_guest_errors,
    a_disk_that_stops_the_vm_ends_it,
    a_disk_that_another_vm_writes_is_refused,
    a_file_is_memory_to_a_guest_on_q35,
    what_is_no_whole_number_of_huge_pages_is_no_memory_on_q35
);
for_backend!(cloud_hypervisor_only, CloudHypervisor, a_file_is_memory_to_a_guest);
for_backend!(
    builtin_only,
    Builtin,
    a_file_is_memory_to_a_guest,
    a_disk_that_another_vm_writes_is_refused,
    a_disk_that_a_thread_serves_keeps_every_byte,
    a_disk_that_shrinks_gives_the_guest_errors,
    a_disk_loses_what_is_discarded
);

fn image(images: &Images, name: &str, mib: usize) -> PathBuf {
    let path = images.dir.path().join(name);
    File::create(&path).unwrap().set_len((mib as u64) << 20).unwrap();
    path
}

fn disk(path: &Path, read_only: bool) -> Kind {
    Kind::Block(Block { path: text(path), read_only, ..Default::default() })
}

async fn disk_keeps_every_byte(backend: Backend, options: &str, mib: usize) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let (question, answer) = (image(&images, "question", mib), image(&images, "answer", mib));
    pattern::write(&mut OpenOptions::new().write(true).open(&question).unwrap(), mib).unwrap();
    // Four quarters at once; one of them past the guest's page cache.
    let script = format!(
        "quarter=$(({mib} / 4))\n\
         for n in 0 1 2; do\n\
         dd if=/dev/vda of=/dev/vdb bs=1M count=$quarter skip=$((n * quarter)) seek=$((n * quarter)) &\n\
         done\n\
         dd if=/dev/vda of=/dev/vdb bs=1M skip=$((3 * quarter)) seek=$((3 * quarter)) iflag=direct oflag=direct\n\
         wait\n\
         sync"
    );
    let disks = [("question", disk(&question, true)), ("answer", disk(&answer, false))];
    let mut request = request(&launcher, &images, &script, &disks);
    request.options += options;
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();

    assert_all_arrived(&ended(&launcher).await);
    pattern::check(&mut File::open(answer).unwrap(), mib).unwrap();
}

async fn a_disk_keeps_every_byte(backend: Backend) {
    disk_keeps_every_byte(backend, "", mib(backend)).await;
}

async fn a_disk_that_a_thread_serves_keeps_every_byte(backend: Backend) {
    disk_keeps_every_byte(backend, "\nblock_io = \"thread\"", little_mib()).await;
}

async fn a_disk_that_another_vm_writes_is_refused(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let path = image(&images, "disk", 1);
    let (first, second) = (Launcher::start(backend).await, Launcher::start(backend).await);
    let mut writes = first.request(&images, "sleep");
    writes.vm.as_mut().unwrap().devices = vec![device("disk", disk(&path, false))];
    first.create(&writes).await.unwrap();

    let mut reads = second.request(&images, "sleep");
    reads.vm.as_mut().unwrap().devices = vec![device("disk", disk(&path, true))];
    let status = second.create(&reads).await.unwrap_err();
    assert!(status.message.contains(path.to_str().unwrap()), "{status}");
    if backend == Backend::Builtin {
        assert_eq!(status.code, Code::INVALID_ARGUMENT);
        let expected = format!("the disk {} is in use by another virtual machine that writes to it", path.display());
        assert_eq!(status.message, expected);
    }
    assert!(second.leftovers().is_empty());
}

/// A disk that is larger than what the host has left.
async fn a_full_host_gives_the_guest_errors(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let small = images.dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let nothing = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(nothing, "/", nothing, MsFlags::MS_PRIVATE | MsFlags::MS_REC, nothing).unwrap();
    mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).unwrap();
    let launcher = Launcher::start(backend).await;
    let path = image(&images, "small/disk", 4);
    let script =
        "if dd if=/dev/zero of=/dev/vda bs=1M count=4 oflag=direct; then echo guest: wrote too much; exit 1; fi";
    launcher.create(&request(&launcher, &images, script, &[("disk", disk(&path, false))])).await.unwrap();
    launcher.boot().await.unwrap();

    let exit = ended(&launcher).await;
    umount(&small).unwrap();
    assert_all_arrived(&exit);
}

async fn a_disk_that_stops_the_vm_ends_it(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let mut request = launcher.request(&images, "sleep");
    request.options += "\nmachine_type = \"q35\"\nextra_args = [\
        \"-blockdev\", \"driver=blkdebug,node-name=bad,image.driver=null-co,inject-error.0.event=none\",\
        \"-device\", \"virtio-blk-pci,drive=bad,rerror=stop\"]";
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();

    let exit = launcher.wait().await;
    assert_eq!(exit.reason, ExitReason::HYPERVISOR_FAILED.into(), "{exit}");
    assert!(exit.detail.starts_with("QEMU stopped the VM, since it could not read or write a disk"), "{exit}");
}

async fn a_disk_that_shrinks_gives_the_guest_errors(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let path = image(&images, "disk", 2);
    let script = "dd if=/dev/vda of=/dev/null bs=64k count=16\n\
                  if dd if=/dev/vda of=/dev/null bs=64k skip=16; then echo guest: read what is not there; exit 1; fi";
    launcher.create(&request(&launcher, &images, script, &[("disk", disk(&path, false))])).await.unwrap();
    OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    launcher.boot().await.unwrap();

    assert_all_arrived(&ended(&launcher).await);
}

async fn a_disk_loses_what_is_discarded(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let path = image(&images, "disk", 4);
    pattern::write(&mut OpenOptions::new().write(true).open(&path).unwrap(), 4).unwrap();
    let script = "blkdiscard -l 1048576 /dev/vda";
    launcher.create(&request(&launcher, &images, script, &[("disk", disk(&path, false))])).await.unwrap();
    launcher.boot().await.unwrap();

    assert_all_arrived(&ended(&launcher).await);
    let content = fs::read(&path).unwrap();
    assert!(content[..1 << 20].iter().all(|&byte| byte == 0));
    assert!(content[1 << 20..(1 << 20) + 64].iter().any(|&byte| byte != 0));
}

async fn file_is_memory_to_a_guest(backend: Backend, options: &str) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let (written, kept) = (image(&images, "written", 4), image(&images, "kept", 2));
    for path in [&written, &kept] {
        OpenOptions::new().write(true).open(path).unwrap().write_all(b"hello").unwrap();
    }
    let script = "for n in 0 1; do\n\
                  [ \"$(head -c 5 /dev/pmem$n)\" = hello ]\n\
                  printf world | dd of=/dev/pmem$n conv=notrunc,fsync\n\
                  [ \"$(head -c 5 /dev/pmem$n)\" = world ]\n\
                  done";
    let pmem = |path: &Path, read_only| Kind::Pmem(Pmem { path: text(path), read_only, ..Default::default() });
    let files = [("written", pmem(&written, false)), ("kept", pmem(&kept, true))];
    let mut request = request(&launcher, &images, script, &files);
    request.options += options;
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();

    assert_all_arrived(&ended(&launcher).await);
    assert!(fs::read(&written).unwrap().starts_with(b"world"));
    assert!(fs::read(&kept).unwrap().starts_with(b"hello"));
}

async fn a_file_is_memory_to_a_guest(backend: Backend) {
    file_is_memory_to_a_guest(backend, "").await;
}

async fn a_file_is_memory_to_a_guest_on_q35(backend: Backend) {
    file_is_memory_to_a_guest(backend, "\nmachine_type = \"q35\"").await;
}

async fn what_is_no_whole_number_of_huge_pages_is_no_memory_on_q35(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let path = image(&images, "odd", 3);
    let pmem = Kind::Pmem(Pmem { path: text(&path), ..Default::default() });
    let mut request = request(&launcher, &images, "", &[("odd", pmem)]);
    request.options += "\nmachine_type = \"q35\"";
    let status = launcher.create(&request).await.unwrap_err();
    assert_eq!(status.code, Code::INVALID_ARGUMENT);
    assert!(status.message.ends_with("not a multiple of 2 MiB; `truncate -s 4M` makes it one"), "{status}");
}
