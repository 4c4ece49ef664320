//! The agent in a guest of its own, driven as a shim drives it. Needs QEMU and what `cargo xtask setup` makes, or another
//! directory with `vmlinux` and `initrd.img`, or `vmlinux` and `rootfs.erofs`, in `$CAISSON_TEST_GUEST`.

mod fixture;
mod isolation;
mod lifecycle;
mod machine;
mod streams;
