use caisson_testbed::*;
#[test]
fn probe() {
    let c = Containerd::of_this_build().unwrap();
    let o = c.run(&["--with-ns", "pid:/proc/1/ns/pid"], &["cat", "/proc/1/status"]).unwrap();
    println!("{o:?} {}", o.stdout_text());
    let o = c.run(&[], &["no-such-program"]).unwrap();
    println!("{o:?} {}", o.stdout_text());
    panic!();
}
