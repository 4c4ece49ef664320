//! Many pods at once.

use std::thread;

use anyhow::Result;
use caisson_testbed::Containerd;

#[test]
fn ten_pods_started_at_once_all_run() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outputs: Vec<Result<String>> = thread::scope(|scope| {
        let run = |number: u32| {
            let containerd = &containerd;
            move || {
                let id = containerd.fresh_id();
                let ctr = containerd.prepare(&[], caisson_testbed::BUSYBOX, &id, &["echo", &number.to_string()]);
                Ok(ctr.limit(2 * crate::LIMIT).run()?.success()?.stdout_text())
            }
        };
        let threads: Vec<_> = (0..10).map(|number| scope.spawn(run(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("the thread does not panic")).collect()
    });
    let outputs = outputs.into_iter().collect::<Result<Vec<_>>>()?;
    let expected: Vec<String> = (0..10).map(|number| format!("{number}\n")).collect();
    assert_eq!(outputs, expected);
    containerd.assert_nothing_left();
    Ok(())
}
