//! The guest around the containers.

use caisson_protocol::{
    containerd::api::Mount,
    guest::{
        AddStorageRequest, ConsoleRequest, CopyFileRequest, InfoRequest, Interface, MetricsRequest,
        OnlineResourcesRequest, RemoveStorageRequest, ReseedRequest, Route, SetTimeRequest, SetupRequest,
        ShutdownRequest, Storage,
    },
    status::{Code, Status},
};
use protobuf::MessageField;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{DISK_SERIAL, Guest, MAC, limit, script};

fn storage(driver: &str, source: &str, mount_point: &str, options: &[&str]) -> Storage {
    Storage {
        driver: driver.into(),
        source: source.into(),
        mount_point: mount_point.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

async fn add(guest: &Guest, storage: Storage) {
    let request = AddStorageRequest { storage: MessageField::some(storage), ..Default::default() };
    guest.guest.add_storage(limit(), &request).await.unwrap();
}

#[tokio::test]
async fn a_guest_becomes_a_sandbox_once() {
    let guest = Guest::boot().await;
    let request = SetupRequest {
        hostname: "pod".into(),
        dns: vec!["nameserver 10.0.2.3".into()],
        interfaces: vec![Interface {
            mac: MAC.into(),
            name: "eth9".into(),
            addresses: vec!["10.0.2.15/24".into()],
            mtu: 1400,
            ..Default::default()
        }],
        routes: vec![Route { gateway: "10.0.2.2".into(), interface: "eth9".into(), ..Default::default() }],
        storages: vec![storage("tmpfs", "", "/run/caisson/shm", &["size=1m"])],
        time_unix_ns: 1_900_000_000_000_000_000,
        entropy: vec![7; 256],
        ..Default::default()
    };
    let info = guest.guest.setup(limit(), &request).await.unwrap().info.unwrap();
    assert!(info.memory_bytes > 400 << 20 && info.kernel_ns > 0 && info.agent_ns > 0, "{info}");
    let again = Status::from(guest.guest.setup(limit(), &request).await.unwrap_err());
    assert_eq!(again.code, Code::FAILED_PRECONDITION);

    let mut config =
        script("hostname; date +%Y; ip addr show eth9 | grep -E 'mtu|inet '; ip route; cat /etc/resolv.conf");
    config.as_object_mut().unwrap().remove("hostname");
    config["linux"]["namespaces"] = json!([{ "type": "pid" }, { "type": "mount" }]);
    config["mounts"].as_array_mut().unwrap().push(
        json!({ "destination": "/etc/resolv.conf", "type": "bind", "source": "/etc/resolv.conf", "options": ["bind", "ro"] }),
    );
    let said = guest.run("web", &config).await.stdout;
    for expected in
        ["pod\n2030\n", "mtu 1400", "inet 10.0.2.15/24", "default via 10.0.2.2 dev eth9", "nameserver 10.0.2.3\n"]
    {
        assert!(said.contains(expected), "{expected:?} in {said}");
    }
}

#[tokio::test]
async fn a_root_file_system_is_stacked_from_a_disk_and_a_writable_layer() {
    let guest = Guest::boot().await;
    let layer = Storage {
        fstype: "erofs".into(),
        ..storage("block", &format!("serial:{DISK_SERIAL}"), "/run/caisson/layer", &["ro"])
    };
    add(&guest, layer).await;
    let rootfs = Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: ["lowerdir=/run/caisson/layer", "upperdir=/run/caisson/rw/upper", "workdir=/run/caisson/rw/work"]
            .map(String::from)
            .to_vec(),
        ..Default::default()
    };
    add(&guest, storage("tmpfs", "", "/run/caisson/rw", &[])).await;
    guest.write("/run/caisson/rw/upper/file", 0o644, b"written\n").await;
    guest.write("/run/caisson/rw/work/.keep", 0o644, b"").await;
    let config = script("cat /file; echo new > /file; cat /file");
    let outcome = guest.run_on("web", &config, vec![rootfs]).await;
    assert_eq!(outcome.stdout, "written\nnew\n", "{}", outcome.stderr);
    let request = RemoveStorageRequest { mount_point: "/run/caisson/layer".into(), ..Default::default() };
    guest.guest.remove_storage(limit(), &request).await.unwrap();
}

#[tokio::test]
async fn a_container_costs_the_agent_little_memory() {
    let guest = Guest::boot().await;
    let task = guest.create("web", &script("sleep 60")).await.unwrap();
    task.start().await.unwrap();
    let text = guest.guest.metrics(limit(), &MetricsRequest::new()).await.unwrap().text;
    let resident = text.lines().find_map(|line| line.strip_prefix("caisson_agent_resident_bytes ")).unwrap();
    assert!(resident.parse::<u64>().unwrap() <= 6 << 20, "{text}");
    assert!(text.contains("caisson_container_memory_bytes{container=\"web\"} "), "{text}");
}

#[tokio::test]
async fn the_machine_is_told_of_time_entropy_and_processors() {
    let guest = Guest::boot().await;
    let request = SetTimeRequest { unix_ns: 1_900_000_000_000_000_000, ..Default::default() };
    guest.guest.set_time(limit(), &request).await.unwrap();
    assert!(guest.run("web", &script("date +%Y")).await.stdout == "2030\n");
    guest.guest.reseed(limit(), &ReseedRequest { entropy: vec![1; 512], ..Default::default() }).await.unwrap();
    let online = OnlineResourcesRequest { vcpus: 1, ..Default::default() };
    assert_eq!(guest.guest.online_resources(limit(), &online).await.unwrap().vcpus, 1);

    let request = CopyFileRequest { path: "/etc/passwd".into(), ..Default::default() };
    let refusal = Status::from(guest.guest.copy_file(limit(), &request).await.unwrap_err());
    assert_eq!(refusal.code, Code::INVALID_ARGUMENT);
    let request = ConsoleRequest { stream: "vsock:2:99".into(), ..Default::default() };
    let refusal = Status::from(guest.guest.console(limit(), &request).await.unwrap_err());
    assert_eq!(
        (refusal.code, refusal.message.as_str()),
        (Code::NOT_FOUND, "the guest has no shell: its root file system needs a /bin/sh")
    );
}

#[tokio::test]
async fn a_shell_opens_in_a_guest_that_has_one() {
    let guest = Guest::boot().await;
    let layer = Storage {
        fstype: "erofs".into(),
        ..storage("block", &format!("serial:{DISK_SERIAL}"), "/run/caisson/layer", &["ro"])
    };
    add(&guest, layer).await;
    add(&guest, storage("bind", "/run/caisson/layer/bin", "/bin", &[])).await;
    let listener = guest.listener();
    let request = ConsoleRequest { stream: listener.address().to_string(), ..Default::default() };
    let (stream, opened) = tokio::join!(listener.accept(), guest.guest.console(limit(), &request));
    opened.unwrap();
    let mut stream = stream.unwrap().into_ttrpc();
    stream.write_all(b"cat /proc/1/comm; exit\n").await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert!(said.contains("\ncaisson-agent\r\n") || said.contains("\ninit\r\n"), "{said}");
}

#[tokio::test]
async fn the_guest_powers_off_when_it_is_told_to() {
    let guest = Guest::boot().await;
    guest.guest.info(limit(), &InfoRequest::new()).await.unwrap();
    let _ = guest.guest.shutdown(limit(), &ShutdownRequest::new()).await;
    guest.ended().await;
}

#[tokio::test]
async fn the_guest_powers_off_when_the_host_has_gone() {
    Guest::boot().await.ended_without_host().await;
}
