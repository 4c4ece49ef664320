//! Finds a user's home directory in a container, for programs that come without `HOME`.
//!
//! Not `getpwuid(3)`: in a static program, it may load libraries of the container.

use std::{fs::File, io::Read, os::fd::AsFd, path::Path};

use oci_spec::runtime::Process;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

/// What is read of a container's `/etc/passwd`.
const MAX_BYTES: u64 = 1 << 20;

/// Adds `HOME` to the environment unless it is there; `root` is the container's root directory.
pub fn add(process: &mut Process, root: &Path) {
    let mut environment = process.env().clone().unwrap_or_default();
    if environment.iter().any(|variable| variable.starts_with("HOME=") && variable.len() > "HOME=".len()) {
        return;
    }
    environment.retain(|variable| !variable.starts_with("HOME="));
    let passwd = read(root).unwrap_or_default();
    environment.push(format!("HOME={}", home_of(process.user().uid(), &passwd).unwrap_or("/")));
    process.set_env(Some(environment));
}

fn read(root: &Path) -> Option<String> {
    let directory = openat2(CWD, root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty()).ok()?;
    // The container's files: its links stay inside, and a pipe does not make anybody wait.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(directory.as_fd(), "etc/passwd", flags, Mode::empty(), inside).ok()?;
    let mut text = Vec::new();
    File::from(file).take(MAX_BYTES).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// `name:password:uid:gid:comment:home:shell`, `passwd(5)`
fn home_of(uid: u32, passwd: &str) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse() == Ok(uid);
        fields.nth(2).filter(|home| found && home.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:1000:1000::/srv/web:/bin/false\n";

    fn process(environment: &[&str]) -> Process {
        let environment = serde_json::json!(environment);
        serde_json::from_value(serde_json::json!({ "cwd": "/", "user": { "uid": 1000, "gid": 0 }, "env": environment }))
            .unwrap()
    }

    #[test]
    fn a_user_is_found_by_number() {
        assert_eq!(home_of(1000, PASSWD), Some("/srv/web"));
        assert_eq!(home_of(0, PASSWD), Some("/root"));
        assert_eq!(home_of(7, PASSWD), None);
    }

    #[test]
    fn a_home_that_is_set_is_kept() {
        let mut process = process(&["HOME=/mine"]);
        add(&mut process, Path::new("/nowhere"));
        assert_eq!(process.env().as_ref().unwrap(), &["HOME=/mine"]);
    }

    #[test]
    fn a_user_without_an_entry_lives_at_the_root() {
        let mut process = process(&["A=b", "HOME="]);
        add(&mut process, Path::new("/nowhere"));
        assert_eq!(process.env().as_ref().unwrap(), &["A=b", "HOME=/"]);
    }

    #[test]
    fn a_link_to_the_hosts_file_stays_in_the_container() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("users"), PASSWD).unwrap();
        std::os::unix::fs::symlink("/users", root.path().join("etc/passwd")).unwrap();
        let mut process = process(&[]);
        add(&mut process, root.path());
        assert_eq!(process.env().as_ref().unwrap(), &["HOME=/srv/web"]);
    }
}
