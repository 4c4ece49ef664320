//! Programs that people really run, from Debian's packages.

use anyhow::Result;
use caisson_testbed::{Containerd, Installation, NGINX};

// nginx goes to the background when it listens.

#[test]
fn nginx_serves_a_page_to_a_client_in_its_container() -> Result<()> {
    let installation = Installation::find()?;
    let containerd = Containerd::start(&installation)?;
    containerd.import(&installation.archives.nginx)?;
    let script = "nginx && wget -qO- http://127.0.0.1/ && nginx -s stop";
    let outcome = containerd.prepare(&[], NGINX, &containerd.fresh_id(), &["sh", "-c", script]).run()?.success()?;
    assert_eq!(outcome.stdout_text(), "<h1>served from a pod of its own</h1>\n");
    containerd.assert_nothing_left();
    Ok(())
}

#[test]
fn nginx_as_a_container_of_its_own_answers_an_exec_and_ends_when_asked() -> Result<()> {
    let installation = Installation::find()?;
    let containerd = Containerd::start(&installation)?;
    containerd.import(&installation.archives.nginx)?;
    let id = containerd.fresh_id();
    let script = "trap 'nginx -s quit; exit 5' TERM; nginx && echo ready; while :; do sleep 600 & wait; done";
    let session = containerd.prepare(&[], NGINX, &id, &["sh", "-c", script]).start()?;
    session.wait_for("ready", crate::LIMIT)?;
    let outcome = containerd.exec(&id, &["wget", "-qO-", "http://127.0.0.1/"]).run()?.success()?;
    assert_eq!(outcome.stdout_text(), "<h1>served from a pod of its own</h1>\n");
    containerd.ctr(&["tasks", "kill", &id]).run()?.success()?;
    assert_eq!(session.wait(crate::LIMIT)?.code, 5);
    containerd.assert_nothing_left();
    Ok(())
}
