//! What goes through a guest's devices arrives as it was sent, under load and in both directions.
//!
//! `$CAISSON_TEST_MIB` says how much that is. Unless it does: 1 GiB each way through our own disks, vsock and shared
//! directories, and 64 MiB through what is others' or less of a part.

use std::{
    env, fs,
    fs::File,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use caisson_protocol::{
    address::{GuestVsock, Stream},
    no_deadline,
    vmm::{CreateRequest, ExitReason, Fs, VmConfig, Vsock, WaitRequest, WaitResponse, device::Kind},
};
use tokio::{
    net::TcpListener,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};

use crate::{
    fixture::{Backend, Images, LIMIT, Launcher, archive, device, for_backend, for_each_backend, text},
    network::{self, GUEST_SETUP, HOST, card},
    pattern,
};

for_each_backend!(vsock_keeps_every_byte, a_card_keeps_every_byte);
for_backend!(qemu_only, Qemu, a_share_keeps_every_byte);
for_backend!(cloud_hypervisor_only, CloudHypervisor, a_share_keeps_every_byte);
for_backend!(stratovirt_only, StratoVirt, a_share_keeps_every_byte);
for_backend!(builtin_only, Builtin, a_share_keeps_every_byte, a_share_of_the_vmm_itself_keeps_every_byte);

/// How much goes each way, in MiB, through what is `backend`'s own.
pub fn mib(backend: Backend) -> usize {
    let usual = if backend == Backend::Builtin { 1024 } else { LITTLE_MIB };
    wanted_mib().unwrap_or(usual)
}

/// How much goes each way, in MiB, through the rest.
pub fn little_mib() -> usize {
    wanted_mib().unwrap_or(LITTLE_MIB)
}

const LITTLE_MIB: usize = 64;

fn wanted_mib() -> Option<usize> {
    env::var("CAISSON_TEST_MIB").ok().map(|mib| mib.parse().expect("CAISSON_TEST_MIB is a number"))
}

/// For moving [`mib`] several times through a guest that is emulated twice.
fn limit(backend: Backend) -> Duration {
    LIMIT + Duration::from_secs(2) * mib(backend) as u32
}

/// A VM that carries out `script` and then powers off. Its console goes to the log.
pub fn request(launcher: &Launcher, images: &Images, script: &str, devices: &[(&str, Kind)]) -> CreateRequest {
    let program = Path::new(env!("CARGO_BIN_EXE_caisson-vmm-qemu")).with_file_name("examples/guest-load");
    let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let [loader, c, gcc] =
        ["/lib64/ld-linux-x86-64.so.2", LIBRARIES[0], LIBRARIES[1]].map(|path| read(Path::new(path)));
    let mut initrd = fs::read(&images.initrd).unwrap();
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(archive(&[
        ("script", format!("set -e\n{script}\necho guest: all arrived\n").as_bytes()),
        ("bin/guest-load", &read(&program)),
        ("lib64/ld-linux-x86-64.so.2", &loader),
        (LIBRARIES[0].trim_start_matches('/'), &c),
        (LIBRARIES[1].trim_start_matches('/'), &gcc),
    ]));
    fs::write(&images.initrd, initrd).unwrap();
    let mut request = launcher.request(images, "script");
    let vm = request.vm.as_mut().unwrap();
    vm.memory_mib = 256;
    vm.devices = vec![launcher.logged_console()];
    vm.devices.extend(devices.iter().map(|(id, kind)| device(id, kind.clone())));
    request
}

/// What the guest's program is linked with.
const LIBRARIES: [&str; 2] = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib/x86_64-linux-gnu/libgcc_s.so.1"];

/// How the VM ended, after as long as moving all that may take.
pub async fn ended(launcher: &Launcher) -> WaitResponse {
    match timeout(limit(launcher.backend), launcher.client.wait(no_deadline(), &WaitRequest::new())).await {
        Ok(exit) => exit.unwrap(),
        Err(_) => panic!("the guest is not done; its console:\n{}", launcher.console().await),
    }
}

pub fn assert_all_arrived(exit: &WaitResponse) {
    assert_eq!(exit.reason, ExitReason::GUEST_SHUTDOWN.into(), "{exit}");
    assert!(exit.console_tail.contains("guest: all arrived"), "{exit}");
}

async fn share_keeps_every_byte(backend: Backend, options: &str) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    let shared = images.dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let mib = mib(backend);
    pattern::write(&mut File::create(shared.join("question")).unwrap(), mib).unwrap();
    let script = format!(
        "mount -t virtiofs share /mnt\n\
         guest-load check /mnt/question {mib}\n\
         guest-load write /mnt/answer {mib}"
    );
    let share = Fs {
        tag: "share".into(),
        shared_dir: text(&shared),
        daemon_path: text(&images.virtiofsd),
        ..Default::default()
    };
    let mut request = request(&launcher, &images, &script, &[("fs", Kind::Fs(share))]);
    request.options += options;
    launcher.create(&request).await.unwrap();
    launcher.boot().await.unwrap();

    assert_all_arrived(&ended(&launcher).await);
    pattern::check(&mut File::open(shared.join("answer")).unwrap(), mib).unwrap();
}

async fn a_share_keeps_every_byte(backend: Backend) {
    share_keeps_every_byte(backend, "").await;
}

async fn a_share_of_the_vmm_itself_keeps_every_byte(backend: Backend) {
    share_keeps_every_byte(backend, "\nfile_server = \"builtin\"").await;
}

/// Where the guest's program listens.
pub const PORT: u32 = 2000;

async fn vsock_keeps_every_byte(backend: Backend) {
    let Some(images) = Images::find() else { return };
    let launcher = Launcher::start(backend).await;
    // Half of it by a connection that the host makes, half by one that the guest makes.
    let mib = mib(backend) / 2;
    let vsock = Vsock { socket: text(&launcher.dir.path().join("vsock.sock")), ..Default::default() };
    let script = format!("guest-load vsock {PORT} {mib}");
    let request = request(&launcher, &images, &script, &[("vsock", Kind::Vsock(vsock))]);
    let created = launcher.create(&request).await.unwrap();
    let guest: GuestVsock = created.devices[1].address.parse().unwrap();
    launcher.boot().await.unwrap();
    launcher.until_console_has("guest: listening").await;

    exchange_over_vsock(&guest, mib).await;

    assert_all_arrived(&ended(&launcher).await);
}

/// `mib` each way by a connection that the host makes, and as much by one that the guest makes.
pub async fn exchange_over_vsock(guest: &GuestVsock, mib: usize) {
    let mut to_guest = blocking(guest.port(PORT).connect().await.unwrap());
    let exchanged = to_guest.try_clone().unwrap();
    spawn_blocking(move || pattern::exchange(&exchanged, &exchanged, mib)).await.unwrap().unwrap();
    let listener = guest.listen_for_stream().unwrap();
    let caisson_protocol::address::Address::Vsock { port, .. } = listener.address() else { panic!("no vsock port") };
    to_guest.write_all(&port.to_le_bytes()).unwrap();
    let mut from_guest = blocking(timeout(LIMIT, listener.accept()).await.expect("the guest dials").unwrap());
    spawn_blocking(move || {
        pattern::exchange(&from_guest, &from_guest, mib)?;
        from_guest.read_exact(&mut [0])?;
        from_guest.write_all(&[0])
    })
    .await
    .unwrap()
    .unwrap();
}

/// The kernel does not tell apart what kind of socket it is.
fn blocking(stream: Stream) -> UnixStream {
    let stream = UnixStream::from(stream.into_fd().unwrap());
    stream.set_nonblocking(false).unwrap();
    stream
}

async fn a_card_keeps_every_byte(backend: Backend) {
    let Some(images) = Images::find() else { return };
    card_keeps_every_byte(backend, &images, little_mib(), |_| {}).await;
}

/// `change` is made to a VM with two vCPUs and a card.
pub async fn card_keeps_every_byte(backend: Backend, images: &Images, mib: usize, change: impl FnOnce(&mut VmConfig)) {
    let queue_pairs = if backend.has_queue_pairs() { 2 } else { 1 };
    // Firecracker takes a tap only if it has one queue.
    network::make(if queue_pairs > 1 { &["multi_queue"] } else { &[] });
    let listener = network::listen("tap0").await;
    let launcher = Launcher::start(backend).await;
    let script = format!("{GUEST_SETUP}\nguest-load connect {HOST} {mib}");
    let mut request = request(&launcher, images, &script, &[("net", card("tap0", queue_pairs))]);
    let vm = request.vm.as_mut().unwrap();
    vm.vcpus = 2;
    change(vm);
    launcher.create(&request).await.unwrap();
    let exchanged = exchange(listener, mib);
    launcher.boot().await.unwrap();

    assert_all_arrived(&ended(&launcher).await);
    exchanged.await.unwrap().unwrap();
}

/// Moves `mib` each way over the first connection.
pub fn exchange(listener: TcpListener, mib: usize) -> JoinHandle<io::Result<()>> {
    tokio::spawn(async move {
        let (stream, _) = timeout(LIMIT, listener.accept()).await??;
        let stream = stream.into_std()?;
        stream.set_nonblocking(false)?;
        spawn_blocking(move || pattern::exchange(&stream, &stream, mib)).await?
    })
}
