//! The agent in a guest of its own, driven as a shim drives it. Needs QEMU and `$CAISSON_TEST_GUEST`.

mod fixture;

use caisson_protocol::guest::InfoRequest;
use fixture::{Guest, config, limit, script};

#[tokio::test]
#[ignore = "boots a guest: set CAISSON_TEST_GUEST"]
async fn a_container_says_hello_and_its_status_is_told() {
    let guest = Guest::boot().await;
    let info = guest.guest.info(limit(), &InfoRequest::new()).await.unwrap();
    assert_eq!(info.vcpus, 1);
    let outcome = guest.run("web", &script("echo hello; echo trouble >&2; exit 7")).await;
    assert_eq!((outcome.status, outcome.stdout.as_str(), outcome.stderr.as_str()), (7, "hello\n", "trouble\n"));
    let outcome = guest.run("web", &config(&["nosuch"])).await;
    assert_eq!(outcome.status, 127);
    assert_eq!(outcome.stderr, "exec \"nosuch\": executable file not found in $PATH\n");
}
