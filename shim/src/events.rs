//! Events for containerd, in the order in which they happened.

use std::{env, time::SystemTime};

use caisson_protocol::{
    containerd::{
        shim::{event::Envelope, events::ForwardRequest},
        shim_async::{Client, EventsClient},
    },
    deadline,
    id::Id,
    status::Status,
};
use protobuf::{
    MessageField, MessageFull,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use tokio::{net::UnixStream, sync::mpsc};
use tracing::warn;

use crate::vm::REQUEST_DEADLINE;

/// containerd's event socket, from its environment.
const ADDRESS_VARIABLE: &str = "TTRPC_ADDRESS";

/// Takes events from anywhere in the shim; one task sends them.
#[derive(Clone, Debug)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::UnboundedSender<Envelope>,
}

impl Publisher {
    /// Starts the sending task, which ends when the last publisher is gone and all is sent.
    pub fn start(namespace: &Id) -> (Self, tokio::task::JoinHandle<()>) {
        let (queue, events) = mpsc::unbounded_channel();
        let address = env::var(ADDRESS_VARIABLE).unwrap_or_default();
        (Self { namespace: namespace.to_string(), queue }, tokio::spawn(send_all(address, events)))
    }

    /// Queues `event` under containerd's `topic`.
    pub fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: MessageField::some(SystemTime::now().into()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                // containerd knows its messages by bare name.
                type_url: M::descriptor().full_name().to_owned(),
                value: event.write_to_bytes().unwrap_or_default(),
                ..Default::default()
            }),
            ..Default::default()
        };
        // The receiver lives as long as any publisher.
        let _ = self.queue.send(envelope);
    }
}

/// A point in time as containerd writes it.
pub fn timestamp(unix_ns: i64) -> MessageField<Timestamp> {
    MessageField::some(Timestamp {
        seconds: unix_ns.div_euclid(1_000_000_000),
        nanos: unix_ns.rem_euclid(1_000_000_000) as i32,
        ..Default::default()
    })
}

async fn send_all(address: String, mut events: mpsc::UnboundedReceiver<Envelope>) {
    let mut connection = None;
    while let Some(envelope) = events.recv().await {
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        // A restarted containerd is found again with the next event; what it missed it reads from the tasks' states.
        if let Err(status) = send(&address, &mut connection, &request).await {
            connection = None;
            if let Err(again) = send(&address, &mut connection, &request).await {
                warn!(%topic, %address, first = %status, error = %again, "event lost");
            }
        }
    }
}

async fn send(address: &str, connection: &mut Option<EventsClient>, request: &ForwardRequest) -> Result<(), Status> {
    let client = match connection {
        Some(client) => client,
        None => {
            let path = address.strip_prefix("unix://").unwrap_or(address);
            let stream = UnixStream::connect(path)
                .await
                .map_err(|error| Status::of(caisson_protocol::status::Code::UNAVAILABLE, &error))?;
            connection.insert(EventsClient::new(Client::new(stream.into())))
        }
    };
    client.forward(deadline(REQUEST_DEADLINE), request).await.map(drop).map_err(Status::from)
}
