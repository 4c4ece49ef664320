//! Our hash trees against cryptsetup's reading of them.

use std::fs;
use std::path::Path;
use std::process::Command;

use image_builder::verity::{self, Verity};

const BLOCK: usize = 4096;

/// Data that differs from block to block.
fn data(blocks: usize) -> Vec<u8> {
    (0..blocks).flat_map(|block| (block as u64).to_le_bytes().repeat(BLOCK / 8)).collect()
}

fn veritysetup_accepts(image: &Path, hash_file: &Path, verity: &Verity) -> bool {
    let mut command = Command::new("/usr/sbin/veritysetup");
    command.arg("verify").arg(image).arg(hash_file).arg(&verity.root_hash);
    command.arg(format!("--hash-offset={}", verity.hash_offset));
    command.output().unwrap().status.success()
}

/// Makes the tree of an image and lets cryptsetup check it.
fn the_tree_is_accepted(blocks: usize) {
    if !crate::common::has("veritysetup") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (image, hash_file) = (directory.path().join("image"), directory.path().join("image.verity"));
    fs::write(&image, data(blocks)).unwrap();
    let verity = verity::write_beside(&image, &hash_file).unwrap();
    assert!(veritysetup_accepts(&image, &hash_file, &verity));
}

#[test]
fn a_single_block_is_its_own_tree() {
    the_tree_is_accepted(1);
}

#[test]
fn a_full_hash_block_is_one_level() {
    the_tree_is_accepted(128);
}

#[test]
fn one_block_more_makes_two_levels() {
    the_tree_is_accepted(129);
}

#[test]
fn three_levels_are_accepted() {
    the_tree_is_accepted(128 * 128 + 1);
}

#[test]
fn an_appended_tree_is_accepted_after_padding() {
    if !crate::common::has("veritysetup") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, &data(200)[..200 * BLOCK - 100]).unwrap();
    let verity = verity::append(&image).unwrap();
    assert_eq!((verity.data_blocks, verity.hash_offset), (200, 200 * BLOCK as u64));
    assert!(veritysetup_accepts(&image, &image, &verity));
}

#[test]
fn a_changed_bit_is_found() {
    if !crate::common::has("veritysetup") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (image, hash_file) = (directory.path().join("image"), directory.path().join("image.verity"));
    let mut bytes = data(150);
    fs::write(&image, &bytes).unwrap();
    let verity = verity::write_beside(&image, &hash_file).unwrap();
    bytes[140 * BLOCK] ^= 1;
    fs::write(&image, &bytes).unwrap();
    assert!(!veritysetup_accepts(&image, &hash_file, &verity));
}

#[test]
fn an_empty_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    fs::write(&image, "").unwrap();
    assert!(verity::append(&image).unwrap_err().to_string().ends_with("is not usable: it is empty"));
}
