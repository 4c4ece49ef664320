//! Same inputs, same bytes: everything is built in two caches that share nothing, and compared.

use std::fs;
use std::path::{Path, PathBuf};

use image_builder::progress::Progress;
use image_builder::recipe::{Compression, Format, Recipe};
use image_builder::{Request, Target, build};

/// Builds everything into `directory`, with a cache of its own.
fn build_all(directory: &Path, recipe: &Recipe, agent: PathBuf) -> PathBuf {
    let output = directory.join("output");
    let request = Request {
        target: Target::All,
        recipe: recipe.clone(),
        output: output.clone(),
        cache: directory.join("cache"),
        agent: Some(agent),
    };
    let report = build(&request, &Progress::silent()).unwrap();
    assert!(report.artifacts.iter().all(|(_, reused)| !reused), "nothing can be reused from an empty cache");
    output
}

fn builds_are_equal(recipe: &Recipe) {
    if !(crate::common::has_kernel_package() && crate::common::is_root()) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (directory.path().join("one"), directory.path().join("other"));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&other).unwrap();
    let agent = crate::common::static_init(directory.path());
    let first = build_all(&one, recipe, agent.clone());
    let second = build_all(&other, recipe, agent);
    for name in ["vmlinux", "bzImage", "initrd.img", "manifest.json"] {
        assert!(fs::read(first.join(name)).unwrap() == fs::read(second.join(name)).unwrap(), "{name} differs");
    }
    let image = image_builder::rootfs::file_name(recipe.rootfs.format);
    assert!(fs::read(first.join(&image)).unwrap() == fs::read(second.join(&image)).unwrap(), "{image} differs");
}

#[test]
fn an_erofs_build_in_another_cache_gives_the_same_bytes() {
    if crate::common::has("mkfs.erofs") {
        builds_are_equal(&crate::common::recipe());
    }
}

#[test]
fn an_ext4_build_with_verity_in_another_cache_gives_the_same_bytes() {
    let mut recipe = crate::common::recipe();
    recipe.rootfs.format = Format::Ext4;
    recipe.rootfs.verity = true;
    recipe.initrd.compression = Compression::Zstd;
    if crate::common::has("mkfs.ext4") {
        builds_are_equal(&recipe);
    }
}
