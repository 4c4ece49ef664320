//! Makes a filesystem image of a directory, the same bytes every time: fixed UUIDs, fixed times, owned by root.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use crate::error::{Error, Result};
use crate::manifest::Section;
use crate::recipe::Format;
use crate::tool::Tool;

/// UUID of every image, and seed of ext4's directory hashes; images are told apart by their digests.
const UUID: &str = "ca155011-0000-4000-8000-000000000001";

/// Time of every file, in seconds since 1970. Not 0, which mkfs.ext4 takes for "now".
const TIME: i64 = 1;

/// Features of ext4 images. No journal: a guest's root is read-only or thrown away.
const EXT4_FEATURES: &str = "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,metadata_csum,sparse_super,64bit";

/// Size of a filesystem block, in bytes.
const BLOCK: u64 = 4096;

/// Names the program that makes the image, with its version, as part of the inputs.
pub fn tool(section: Section, format: Format) -> Result<Section> {
    let program = match format {
        Format::Erofs => "mkfs.erofs",
        Format::Ext4 => "mkfs.ext4",
    };
    // Both name themselves and their version in the first line, whatever they think of the option.
    let words = Tool::new(program, format!("make the {} image", name(format))).arg("-V").run_merged()?;
    Ok(section.tool(program, words.lines().next().unwrap_or_default()))
}

/// Makes the image.
pub fn make(format: Format, root: &Path, image: &Path) -> Result<()> {
    let mut contents = Contents::default();
    prepare(root, &mut contents)?;
    match format {
        Format::Erofs => make_erofs(root, image),
        Format::Ext4 => make_ext4(root, image, &contents),
    }
}

/// `erofs` or `ext4`.
pub fn name(format: Format) -> &'static str {
    match format {
        Format::Erofs => "erofs",
        Format::Ext4 => "ext4",
    }
}

fn make_erofs(root: &Path, image: &Path) -> Result<()> {
    Tool::new("mkfs.erofs", "make the erofs image")
        .args(["--quiet", "--all-root", "-T", &TIME.to_string(), "-U", UUID])
        .arg(image)
        .arg(root)
        .run()?;
    Ok(())
}

fn make_ext4(root: &Path, image: &Path, contents: &Contents) -> Result<()> {
    Tool::new("mkfs.ext4", "make the ext4 image")
        .env("MKE2FS_CONFIG", "/dev/null")
        .env("E2FSPROGS_FAKE_TIME", &TIME.to_string())
        .args(["-q", "-F", "-b", &BLOCK.to_string(), "-I", "256", "-m", "0", "-O", EXT4_FEATURES, "-U", UUID])
        .args(["-E", &format!("hash_seed={UUID},root_owner=0:0,lazy_itable_init=0,nodiscard")])
        .args(["-N", &contents.inode_count().to_string(), "-d"])
        .arg(root)
        .arg(image)
        .arg(format!("{}k", contents.image_size() / 1024))
        .run()?;
    fix_change_times(image, contents)
}

/// First inode that mkfs.ext4 gives out after `lost+found`.
const FIRST_INODE: u64 = 12;

/// mkfs.ext4 copies the files' change times, which nobody can set, and debugfs can.
fn fix_change_times(image: &Path, contents: &Contents) -> Result<()> {
    // The root directory has inode 2, and is one of those counted.
    let last = FIRST_INODE + contents.inodes.len() as u64 - 1;
    let inodes = [2, FIRST_INODE - 1].into_iter().chain(FIRST_INODE..last);
    let script: String = inodes.map(|inode| format!("set_inode_field <{inode}> ctime @{TIME}\n")).collect();
    let commands = image.with_extension("debugfs");
    fs::write(&commands, script).map_err(Error::file("write", &commands))?;
    Tool::new("debugfs", "give the ext4 image fixed times")
        .env("E2FSPROGS_FAKE_TIME", &TIME.to_string())
        .args(["-w", "-f"])
        .arg(&commands)
        .arg(image)
        .run()?;
    fs::remove_file(&commands).map_err(Error::file("remove", &commands))
}

/// What there is in a directory.
#[derive(Clone, Debug, Default)]
struct Contents {
    /// Inodes; several names may stand for one.
    inodes: BTreeSet<u64>,
    /// Bytes, each file rounded up to whole blocks.
    bytes: u64,
}

impl Contents {
    /// Inodes of the image: some to spare, for a guest that writes.
    fn inode_count(&self) -> u64 {
        let used = self.inodes.len() as u64;
        used + used / 4 + 64
    }

    /// Content, inode table, and an eighth to spare, in whole mebibytes.
    fn image_size(&self) -> u64 {
        let needed = self.bytes + self.inode_count() * 256;
        (needed + needed / 8 + (1 << 20)).next_multiple_of(1 << 20)
    }
}

/// Gives everything the fixed time, and measures it.
fn prepare(path: &Path, contents: &mut Contents) -> Result<()> {
    let metadata = fs::symlink_metadata(path).map_err(Error::file("read", path))?;
    if contents.inodes.insert(metadata.ino()) {
        contents.bytes += metadata.len().next_multiple_of(BLOCK);
    }
    if metadata.is_dir() {
        for entry in fs::read_dir(path).map_err(Error::file("read", path))? {
            prepare(&entry.map_err(Error::file("read", path))?.path(), contents)?;
        }
    }
    let time = Timespec { tv_sec: TIME, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|error| Error::file("set the time of", path)(error.into()))
}
