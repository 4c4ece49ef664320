//! Standard streams: nothing lost, nothing mixed, and a terminal that is one.

use anyhow::{Context, Result};
use caisson_testbed::{BUSYBOX, Containerd};

use crate::LIMIT;

/// In bytes; the container prints a hundred of them, each with a number before it.
const BLOCK: usize = 1 << 20;

#[test]
fn output_arrives_on_the_stream_that_it_was_written_to() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let outcome = containerd.run(&[], &["sh", "-c", "echo out; echo err >&2"])?;
    assert_eq!((outcome.code, outcome.stdout_text().as_str(), outcome.stderr.as_str()), (0, "out\n", "err\n"));
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_hundred_megabytes_of_output_arrive_complete_and_in_order() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let script = format!(
        "head -c {BLOCK} /dev/urandom > /dev/shm/block; sha256sum < /dev/shm/block >&2; \
         i=100; while [ $i -lt 200 ]; do printf $i; dd if=/dev/shm/block bs=1M 2>/dev/null; i=$((i + 1)); done; cat /dev/shm/block | sha256sum"
    );
    let outcome = containerd.run(&[], &["sh", "-c", &script])?.success()?;
    let blocks: Vec<&[u8]> = outcome.stdout.chunks(BLOCK + 3).collect();
    let (digest, blocks) = blocks.split_last().context("no output")?;
    assert_eq!(blocks.len(), 100);
    // The digest after the last block is the one that was told first: the block did not change on the way either.
    assert_eq!(String::from_utf8_lossy(digest), outcome.stderr);
    for (number, block) in blocks.iter().enumerate() {
        assert_eq!(&block[..3], (100 + number).to_string().as_bytes());
        assert!(block[3..] == blocks[0][3..], "block {number} differs from the first");
    }
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn what_is_piped_in_comes_back_from_cat() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let input: Vec<u8> = (0..16 * BLOCK as u64 / 8).flat_map(|number| number.to_le_bytes()).collect();
    let id = containerd.fresh_id();
    let outcome = containerd.prepare(&[], BUSYBOX, &id, &["cat"]).input(input.clone()).run()?.success()?;
    assert_eq!(outcome.stdout.len(), input.len());
    assert!(outcome.stdout == input, "the bytes are not the same");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn the_end_of_standard_input_is_seen_in_the_container() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let script = "echo up; wc -c; echo done";
    let mut session = containerd.prepare(&[], BUSYBOX, &containerd.fresh_id(), &["sh", "-c", script]).start()?;
    // ctr itself forgets an end that comes before the container has started.
    session.wait_for("up", LIMIT)?;
    session.feed(b"12345".to_vec());
    assert_eq!(session.wait(LIMIT)?.success()?.stdout_text(), "up\n5\ndone\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_terminal_follows_the_size_of_the_users() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let script = "trap 'stty size' WINCH; trap 'exit 9' INT; stty size; while :; do sleep 60 & wait; done";
    let ctr = containerd.prepare(&["--tty"], BUSYBOX, &containerd.fresh_id(), &["sh", "-c", script]);
    let mut session = ctr.start_on_terminal(33, 77)?;
    session.wait_for("33 77", LIMIT)?;
    session.resize(50, 132)?;
    session.wait_for("50 132", LIMIT)?;
    // The interrupt key: the guest's terminal makes a signal of it.
    session.write(b"\x03")?;
    assert_eq!(session.wait(LIMIT)?.code, 9);
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn a_terminal_echoes_and_ends_lines_as_terminals_do() -> Result<()> {
    let containerd = Containerd::of_this_build()?;
    let script = "test -t 0 && test -t 1 && echo terminal; read line; echo got $line";
    let ctr = containerd.prepare(&["--tty"], BUSYBOX, &containerd.fresh_id(), &["sh", "-c", script]);
    let mut session = ctr.start_on_terminal(24, 80)?;
    // The whole line: what is typed before its end is echoed before its end.
    session.wait_for("\n", LIMIT)?;
    session.write(b"words\r")?;
    let outcome = session.wait(LIMIT)?.success()?;
    // Each of the two terminals, the container's and the user's, makes a carriage return of its own.
    assert_eq!(outcome.stdout_text().replace('\r', ""), "terminal\nwords\ngot words\n");
    containerd.assert_nothing_left();
    Ok(())
}
