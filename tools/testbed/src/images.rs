//! The container images of the demo and the tests, made from the Debian packages of this machine's release.

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    Cache,
    image::{Image, write_archive},
};

/// A shell and its tools, as root.
pub const BUSYBOX: &str = "caisson.test/busybox:latest";
/// What Kubernetes' runtimes keep a pod's namespaces with: a program that does nothing.
pub const PAUSE: &str = "caisson.test/pause:latest";
/// The same as [`BUSYBOX`], but as user `app` (1000:1000, also in groups `data` 2000 and `logs` 2001), in its home /home/app.
pub const BUSYBOX_APP: &str = "caisson.test/busybox-app:latest";
/// Debian's nginx, which serves one page on port 80; `/bin/busybox` is there for a client.
pub const NGINX: &str = "caisson.test/nginx:latest";

const BUSYBOX_PROGRAM: &str = "/bin/busybox";
/// Any change to how images are made must change this.
const RECIPE: &[u8] = b"3";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                      app:x:1000:1000:app:/home/app:/bin/sh\n\
                      www-data:x:33:33:www-data:/var/www:/bin/false\n\
                      nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const GROUP: &str = "root:x:0:\napp:x:1000:\nwww-data:x:33:\ndata:x:2000:app\nlogs:x:2001:app\nnogroup:x:65534:\n";
const NGINX_CONF: &str = "worker_processes 1;\nerror_log stderr;\npid /run/nginx.pid;\nevents {}\n\
                          http { access_log off; server { listen 80; root /var/www/html; } }\n";
const NGINX_PAGE: &str = "<h1>served from a pod of its own</h1>\n";

/// The archives that `ctr images import` takes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Archives {
    /// [`BUSYBOX`], [`BUSYBOX_APP`] and [`PAUSE`].
    pub busybox: PathBuf,
    /// [`NGINX`].
    pub nginx: PathBuf,
}

impl Archives {
    /// Takes both from the cache or makes them.
    ///
    /// # Errors
    /// When busybox-static or mmdebstrap is not installed, or the packages cannot be had.
    pub fn make(cache: &Cache) -> Result<Self> {
        let program = fs::read(BUSYBOX_PROGRAM).context("read /bin/busybox of the package busybox-static")?;
        let inputs: [&[u8]; 2] = [RECIPE, &program];
        Ok(Self {
            busybox: cache.get("busybox.tar", &inputs, make_busybox)?,
            nginx: cache.get("nginx.tar", &inputs, make_nginx)?,
        })
    }
}

fn make_busybox(archive: &Path) -> Result<()> {
    let rootfs = archive.with_extension("rootfs");
    fs::create_dir_all(&rootfs).context("make the root file system")?;
    add_busybox(&rootfs)?;
    add_basics(&rootfs)?;
    for (name, mode) in [("root", 0o700), ("home/app", 0o755), ("mnt", 0o755)] {
        make_dir(&rootfs.join(name), mode)?;
    }
    // Neither a program nor executable: for the exit code 126.
    fs::write(rootfs.join("etc/motd"), "hello\n").context("write /etc/motd")?;
    let root = Image { name: BUSYBOX, rootfs: &rootfs, command: &["sh"], user: "", working_dir: "/" };
    let app = Image { name: BUSYBOX_APP, rootfs: &rootfs, command: &["sh"], user: "app", working_dir: "/home/app" };
    let pause = Image { name: PAUSE, rootfs: &rootfs, command: &["sleep", "86400"], user: "", working_dir: "/" };
    write_archive(&[root, app, pause], &mut create(archive)?)
}

fn make_nginx(archive: &Path) -> Result<()> {
    let rootfs = archive.with_extension("rootfs");
    extract_packages("nginx", &rootfs)?;
    add_busybox(&rootfs)?;
    add_basics(&rootfs)?;
    write(&rootfs, "etc/nginx/nginx.conf", NGINX_CONF)?;
    write(&rootfs, "var/www/html/index.html", NGINX_PAGE)?;
    // What no server needs is most of it.
    for bulk in ["usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache", "var/lib/apt", "var/lib/dpkg"] {
        fs::remove_dir_all(rootfs.join(bulk)).ok();
    }
    let image = Image {
        name: NGINX,
        rootfs: &rootfs,
        command: &["/usr/sbin/nginx", "-g", "daemon off;"],
        user: "",
        working_dir: "/",
    };
    write_archive(&[image], &mut create(archive)?)
}

/// Unpacks a package and what it depends on, without running any of its scripts.
fn extract_packages(package: &str, rootfs: &Path) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).unwrap_or("stable");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--variant=extract", "--format=directory"]).arg(format!("--include={package}"));
    let output = mmdebstrap.arg(suite).arg(rootfs).output().context("execute mmdebstrap")?;
    ensure!(output.status.success(), "mmdebstrap {package}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// /bin/busybox with a link for each of its applets that the root file system does not have.
fn add_busybox(rootfs: &Path) -> Result<()> {
    let bin = rootfs.join("bin");
    make_dir(&bin, 0o755)?;
    fs::copy(BUSYBOX_PROGRAM, bin.join("busybox")).context("copy /bin/busybox")?;
    let output = Command::new(BUSYBOX_PROGRAM).arg("--list").output().context("execute busybox --list")?;
    for applet in String::from_utf8_lossy(&output.stdout).lines().filter(|name| *name != "busybox") {
        if fs::symlink_metadata(bin.join(applet)).is_err() {
            symlink("busybox", bin.join(applet)).with_context(|| format!("link {applet}"))?;
        }
    }
    Ok(())
}

fn add_basics(rootfs: &Path) -> Result<()> {
    for (name, mode) in
        [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("etc", 0o755), ("tmp", 0o1777)]
    {
        make_dir(&rootfs.join(name), mode)?;
    }
    write(rootfs, "etc/passwd", PASSWD)?;
    write(rootfs, "etc/group", GROUP)
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let made = fs::create_dir_all(path).and_then(|()| fs::set_permissions(path, PermissionsExt::from_mode(mode)));
    made.with_context(|| format!("make {}", path.display()))
}

fn write(rootfs: &Path, name: &str, text: &str) -> Result<()> {
    let path = rootfs.join(name);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

fn create(archive: &Path) -> Result<File> {
    File::create(archive).with_context(|| format!("make {}", archive.display()))
}
