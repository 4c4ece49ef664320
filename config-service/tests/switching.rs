//! Another configuration in force: in one step, only a good one, and back again.

mod host;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use caisson_config_service::{
    resolve::Resolver,
    switch::{self, Error, Switched},
};
use host::{Host, SHIPPED};

const LINK: &str = "etc/configuration.toml";

fn host() -> Host {
    let host = Host::new();
    host.installed("qemu", "");
    host.installed("builtin", "");
    host
}

async fn choose(host: &Host, wanted: &str) -> Result<Switched, Error> {
    switch::use_configuration(&mut Resolver::new(host.installation()), wanted).await
}

async fn go_back(host: &Host) -> Result<Switched, Error> {
    switch::use_previous(&mut Resolver::new(host.installation())).await
}

fn target(host: &Host) -> PathBuf {
    fs::read_link(host.path(LINK)).unwrap()
}

fn of(host: &Host, hypervisor: &str) -> PathBuf {
    host.path(&format!("share/defaults/caisson/configuration-{hypervisor}.toml"))
}

fn told(host: &Host, result: Result<Switched, Error>) -> String {
    host.shortened(&result.unwrap_err().to_string())
}

#[tokio::test]
async fn a_hypervisors_name_is_enough() {
    let host = host();
    let switched = choose(&host, "qemu").await.unwrap();
    assert_eq!(switched, Switched { now: Some(of(&host, "qemu")), before: None });
    assert_eq!(target(&host), of(&host, "qemu"));
}

#[tokio::test]
async fn a_file_beside_the_link_is_linked_by_its_name() {
    let host = host();
    let mine = host.path("etc/configuration-mine.toml");
    fs::copy(of(&host, "qemu"), &mine).unwrap();
    choose(&host, mine.to_str().unwrap()).await.unwrap();
    assert_eq!(target(&host), Path::new("configuration-mine.toml"));
}

#[tokio::test]
async fn the_administrators_file_comes_before_the_shipped_one() {
    let host = host();
    fs::copy(of(&host, "qemu"), host.path("etc/configuration-qemu.toml")).unwrap();
    choose(&host, "qemu").await.unwrap();
    assert_eq!(target(&host), Path::new("configuration-qemu.toml"));
}

#[tokio::test]
async fn going_back_twice_is_where_one_began() {
    let host = host();
    choose(&host, "qemu").await.unwrap();
    choose(&host, "builtin").await.unwrap();
    let back = go_back(&host).await.unwrap();
    assert_eq!(back, Switched { now: Some(of(&host, "qemu")), before: Some(of(&host, "builtin")) });
    go_back(&host).await.unwrap();
    assert_eq!(target(&host), of(&host, "builtin"));
}

#[tokio::test]
async fn going_back_to_no_link_leaves_the_shipped_one_in_force() {
    let host = host();
    symlink(of(&host, "qemu"), host.path(SHIPPED)).unwrap();
    choose(&host, "builtin").await.unwrap();
    assert_eq!(go_back(&host).await.unwrap().now, None);
    assert_eq!(host.resolve().await.unwrap().config.hypervisor, "qemu");
}

#[tokio::test]
async fn the_link_itself_stays_what_it_is() {
    let host = host();
    choose(&host, "qemu").await.unwrap();
    choose(&host, host.path(LINK).to_str().unwrap()).await.unwrap();
    assert_eq!(target(&host), of(&host, "qemu"));
}

#[tokio::test]
async fn without_a_switch_there_is_no_way_back() {
    let host = host();
    assert_eq!(told(&host, go_back(&host).await), "DIR/etc/configuration.toml was not switched before");
}

#[tokio::test]
async fn a_switch_that_was_killed_before_the_link_moved_is_no_step() {
    let host = host();
    choose(&host, "qemu").await.unwrap();
    choose(&host, "builtin").await.unwrap();
    let history = host.path("etc/configuration.history");
    let lines = fs::read_to_string(&history).unwrap();
    fs::write(&history, format!("{lines}/never/happened.toml\n")).unwrap();
    assert_eq!(go_back(&host).await.unwrap().now, Some(of(&host, "qemu")));
}

#[tokio::test]
async fn what_a_killed_switch_left_is_in_nobodys_way_and_unharmed() {
    let host = host();
    let text = fs::read(of(&host, "builtin")).unwrap();
    symlink(of(&host, "builtin"), host.path("etc/configuration.toml.new")).unwrap();
    symlink(of(&host, "builtin"), host.path("etc/configuration.history.new")).unwrap();
    choose(&host, "qemu").await.unwrap();
    assert_eq!(target(&host), of(&host, "qemu"));
    assert_eq!(fs::read(of(&host, "builtin")).unwrap(), text);
}

#[tokio::test]
async fn a_broken_configuration_is_not_put_in_force() {
    let host = host();
    choose(&host, "qemu").await.unwrap();
    host.installed("builtin", "bogu = 1\ndefault_vcpus = -7");
    let words = told(&host, choose(&host, "builtin").await);
    assert!(words.contains("configuration-builtin.toml has 2 problems:\n"), "{words}");
    assert_eq!(target(&host), of(&host, "qemu"));
}

#[tokio::test]
async fn drop_ins_beside_the_link_are_judged_too() {
    let host = host();
    host.write("etc/config.d/a.toml", "[hypervisor.builtin]\ndefault_vcpus = -7");
    let words = told(&host, choose(&host, "builtin").await);
    assert!(words.contains("DIR/etc/config.d/a.toml:2:1: hypervisor.builtin.default_vcpus"), "{words}");
}

#[tokio::test]
async fn a_hypervisor_without_a_configuration_says_where_it_was_looked_for() {
    let host = host();
    assert_eq!(
        told(&host, choose(&host, "clh").await),
        "there is no configuration for \"clh\": looked for DIR/etc/configuration-cloud-hypervisor.toml, \
         DIR/etc/configuration-clh.toml, DIR/share/defaults/caisson/configuration-cloud-hypervisor.toml, \
         DIR/share/defaults/caisson/configuration-clh.toml"
    );
}

#[tokio::test]
async fn a_misspelt_name_gets_the_nearest_one() {
    let host = host();
    let words = told(&host, choose(&host, "dragonbal").await);
    assert!(words.ends_with("; did you mean \"dragonball\"?"), "{words}");
}

#[tokio::test]
async fn a_file_of_its_own_is_not_lost() {
    let host = host();
    host.configure("");
    assert_eq!(
        told(&host, choose(&host, "qemu").await),
        "DIR/etc/configuration.toml is a file and not a symbolic link, which switching would lose: rename it to \
         configuration-<name>.toml"
    );
}

#[tokio::test]
async fn the_list_tells_what_is_in_force_and_what_is_broken() {
    let host = host();
    host.installed("builtin", "bogu = 1");
    choose(&host, "qemu").await.unwrap();
    let listed = switch::list(&mut Resolver::new(host.installation())).await;
    let listed: Vec<_> = listed
        .iter()
        .map(|listed| (listed.hypervisor.as_deref().unwrap(), listed.in_force, listed.problems.len()))
        .collect();
    assert_eq!(listed, [("builtin", false, 1), ("qemu", true, 0)]);
}
