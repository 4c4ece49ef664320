use caisson_testbed::*;
#[test]
fn probe() {
    let c = Containerd::of_this_build().unwrap();
    for s in ["dd if=/dev/zero bs=1M count=100 of=/dev/null", "dd if=/dev/zero bs=1M count=100 | dd bs=1M of=/dev/null", "dd if=/dev/zero bs=1M count=100", "dd if=/dev/zero bs=64k count=1600", "head -c 1M /dev/urandom > /dev/shm/b;time sha256sum /dev/shm/b >&2"] {
    let o = c.run(&[], &["sh", "-c", s]).unwrap();
    println!("{s}: {:?} {:?} {}", o.took, o.first_output,  o.stderr);
    }
    panic!();
}
