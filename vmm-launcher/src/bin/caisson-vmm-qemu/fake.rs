//! A QEMU that has its machine protocol and nothing behind it: a test says what it answers.

use caisson_vmm_launcher::qmp::Qmp;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

/// A client of one that says to each command, with its arguments, what `answer` has: `return` or `error` go to who asks,
/// and events to everybody. It hangs up where that is `null`.
pub fn qmp(mut answer: impl FnMut(&str, &Value) -> Vec<Value> + Send + 'static) -> Qmp {
    let (client, server) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let (reader, mut writer) = server.into_split();
        let mut lines = BufReader::new(reader).lines();
        writer.write_all(b"{\"QMP\": {}}\n").await.unwrap();
        while let Ok(Some(line)) = lines.next_line().await {
            let command: Value = serde_json::from_str(&line).unwrap();
            for mut message in answer(command["execute"].as_str().unwrap(), &command["arguments"]) {
                if message.is_null() {
                    return;
                }
                if message.get("event").is_none() {
                    message["id"] = command["id"].clone();
                }
                writer.write_all(format!("{message}\n").as_bytes()).await.unwrap();
            }
        }
    });
    Qmp::over("QEMU", client)
}

/// A command's answer that has nothing to tell.
pub fn done() -> Value {
    json!({ "return": {} })
}

/// A refusal.
pub fn refused(class: &str, words: &str) -> Value {
    json!({ "error": { "class": class, "desc": words } })
}
