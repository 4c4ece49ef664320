//! The agent in a guest of its own, driven as a shim drives it. Needs QEMU and `$CAISSON_TEST_GUEST`, a directory with
//! `vmlinux` and `initrd.img` as `image-builder` makes them.

mod fixture;
mod isolation;
mod lifecycle;
mod machine;
mod streams;
