//! A file server in this process, on fuse-backend-rs.
//!
//! Some threads of its own serve the queues, so that a slow file system on the host holds nothing else up: each takes one
//! request at a time. They have the process' rights, and the shared directory is all that the library lets them reach; a guest
//! that finds a hole in it is in the VMM. Who wants a wall there takes virtiofsd.

use std::{
    io,
    os::fd::AsRawFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use caisson_protocol::vmm;
use caisson_vmm_launcher::{Error, Result};
use fuse_backend_rs::{
    api::{Vfs, VfsOptions, filesystem::FsOptions, server::Server},
    passthrough::{CachePolicy, Config, PassthroughFs},
    transport::{FsCacheReqHandler, Reader, VirtioFsWriter, Writer},
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, umask},
};
use tracing::{debug, error, warn};
use virtio_bindings::{virtio_ids::VIRTIO_ID_FS, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use virtio_queue::QueueT as _;
use virtio_queue_017::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};
use vm_memory_017::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{FEATURES, QUEUE_SIZES, config_space};
use crate::{
    memory::GuestMemory,
    virtio::{Driver, Interrupt, VirtioDevice, config_space, device::ActivateError},
};

/// Requests that are served at the same time.
const WORKERS: usize = 4;
/// How long requests of a driver that has gone may go on.
const DEADLINE: Duration = Duration::from_secs(10);
/// The epoll number of the descriptor that ends the workers; queues have their own.
const STOP: u64 = QUEUE_SIZES.len() as u64;

/// A file system device that this process serves.
pub struct InProcess {
    tag: String,
    config: Vec<u8>,
    directory: Config,
    counters: Arc<Counters>,
    workers: Option<Workers>,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    /// Not of a form that can be answered.
    broken_requests: AtomicU64,
}

impl InProcess {
    /// Shares `fs.shared_dir`.
    ///
    /// # Errors
    /// When that is no directory, or `fs` has arguments for virtiofsd.
    pub fn new(fs: &vmm::Fs) -> Result<Self> {
        if !Path::new(&fs.shared_dir).is_dir() {
            return Err(Error::Invalid(format!("shared_dir {} is not a directory", fs.shared_dir)));
        }
        if !fs.extra_args.is_empty() {
            let arguments = fs.extra_args.join(" ");
            return Err(Error::Invalid(format!(
                "share \"{}\" has arguments for virtiofsd ({arguments}), which does not serve it: take them away",
                fs.tag
            )));
        }
        Ok(Self {
            tag: fs.tag.clone(),
            config: config_space(&fs.tag),
            directory: passthrough_config(fs),
            counters: Arc::default(),
            workers: None,
        })
    }
}

/// The same timeouts as virtiofsd's.
fn passthrough_config(fs: &vmm::Fs) -> Config {
    let (cache_policy, timeout) = match fs.cache.as_str() {
        "never" => (CachePolicy::Never, Duration::ZERO),
        "always" => (CachePolicy::Always, Duration::from_secs(86400)),
        _ => (CachePolicy::Auto, Duration::from_secs(1)),
    };
    Config {
        root_dir: fs.shared_dir.clone(),
        cache_policy,
        entry_timeout: timeout,
        attr_timeout: timeout,
        do_import: false,
        ..Config::default()
    }
}

/// A server of the directory, which is all that its tree of file systems has: by itself the directory does not negotiate what
/// makes requests long and parallel.
fn server(directory: Config) -> io::Result<Server<Vfs>> {
    let tree = Vfs::new(VfsOptions {
        out_opts: FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::BIG_WRITES
            | FsOptions::DO_READDIRPLUS
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::READDIRPLUS_AUTO,
        no_open: false,
        no_opendir: false,
        no_writeback: true,
        ..VfsOptions::default()
    });
    let mount = move || {
        own_file_mode_mask()?;
        let directory = PassthroughFs::<()>::new(directory)?;
        directory.import()?;
        tree.mount(Box::new(directory), "/").map_err(io::Error::other)?;
        Ok(Server::new(tree))
    };
    let mounted = thread::Builder::new().name("fs mount".into()).spawn(mount)?;
    mounted.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

/// Gives this thread a file mode creation mask of its own, an empty one, because a guest's processes have theirs. The library
/// would clear that of the whole process.
fn own_file_mode_mask() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    umask(Mode::empty());
    Ok(())
}

impl VirtioDevice for InProcess {
    fn kind(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        // A server of its own: what the last driver had open is of no use to the next.
        let server = server(self.directory.clone())?;
        self.workers = Some(Workers::start(&self.tag, driver, server, self.counters.clone())?);
        debug!(tag = self.tag, "share in use");
        Ok(())
    }

    /// Nobody asks us: the workers read the queues' eventfds.
    fn queue_notified(&mut self, _queue: usize) {}

    fn is_served_elsewhere(&self) -> bool {
        true
    }

    fn reset(&mut self) {
        if let Some(workers) = self.workers.take()
            && !workers.end(DEADLINE)
        {
            error!(tag = self.tag, "the host's file system does not answer: a request may still write to guest memory");
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requests_total", self.counters.requests.load(Ordering::Relaxed)),
            ("broken_requests_total", self.counters.broken_requests.load(Ordering::Relaxed)),
        ]
    }
}

/// The threads that serve one driver. When this is dropped they end after their requests, and nobody waits for them: what
/// they use is theirs.
struct Workers {
    shared: Arc<Shared>,
    /// Disconnected when the last one has ended.
    ended: mpsc::Receiver<()>,
}

impl Workers {
    fn start(tag: &str, driver: Driver, server: Server<Vfs>, counters: Arc<Counters>) -> Result<Self, ActivateError> {
        let (alive, ended) = mpsc::channel();
        // Dropped, and with it those that have started, when one cannot.
        let workers = Self { shared: Arc::new(Shared::new(driver, server, counters)?), ended };
        for _ in 0..WORKERS {
            let (shared, alive) = (workers.shared.clone(), alive.clone());
            thread::Builder::new().name(format!("fs {tag}")).spawn(move || {
                shared.work();
                drop(alive);
            })?;
        }
        Ok(workers)
    }

    /// Whether all have ended within `deadline`.
    fn end(self, deadline: Duration) -> bool {
        self.shared.stop();
        self.ended.recv_timeout(deadline) == Err(RecvTimeoutError::Disconnected)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

/// What the workers of one driver have in common.
struct Shared {
    server: Server<Vfs>,
    counters: Arc<Counters>,
    memory: SharedMemory,
    /// None: the driver has not set it up, has broken it, or is gone.
    rings: Vec<Mutex<Option<Queue>>>,
    kicks: Vec<EventFd>,
    interrupt: Interrupt,
    stop: EventFd,
    /// Watches the descriptors above.
    events: Epoll,
}

impl Shared {
    fn new(driver: Driver, server: Server<Vfs>, counters: Arc<Counters>) -> Result<Self, ActivateError> {
        let event_idx = driver.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let rings = driver.queues.iter().map(|queue| ring(queue, event_idx)).collect::<Result<_, _>>()?;
        let (stop, events) = (EventFd::new(EFD_NONBLOCK)?, Epoll::new()?);
        for (number, kick) in (0..).zip(&driver.kicks) {
            // An edge wakes one worker, which wakes the next when there is more to do.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, number);
            events.ctl(ControlOperation::Add, kick.as_raw_fd(), event)?;
        }
        // A level wakes all.
        events.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        let memory = SharedMemory::new(driver.memory)?;
        Ok(Self { server, counters, memory, rings, kicks: driver.kicks, interrupt: driver.interrupt, stop, events })
    }

    /// Has all workers end after the requests that they serve, whose answers the driver does not get any more.
    fn stop(&self) {
        (0..self.rings.len()).filter_map(|index| self.lock(index)).for_each(|mut ring| *ring = None);
        // Fails only when it is written already.
        let _ = self.stop.write(1);
    }

    /// Serves requests until told to stop.
    fn work(&self) {
        if let Err(error) = own_file_mode_mask() {
            return error!(%error, "a thread of a share's file server ends");
        }
        let mut event = [EpollEvent::default()];
        loop {
            match self.events.wait(-1, &mut event) {
                Ok(1) if event[0].data() == STOP => return,
                Ok(_) => self.serve(event[0].data() as usize),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error!(%error, "a thread of a share's file server ends"),
            }
        }
    }

    /// Serves the queue's requests. While there are several, another worker is woken for the next.
    fn serve(&self, index: usize) {
        while let Some((chain, more)) = self.take(index) {
            if more {
                // Fails only when it is written already.
                let _ = self.kicks[index].write(1);
            }
            let head = chain.head_index();
            let length = self.answer(chain);
            self.give_back(index, head, length);
        }
    }

    /// The queue's next request, and whether there are more; what comes later notifies whoever is free.
    fn take(&self, index: usize) -> Option<(DescriptorChain<&GuestMemoryMmap>, bool)> {
        let memory = self.memory.memory();
        self.with_ring(index, |ring| {
            loop {
                let chain = ring.iter(memory)?.next();
                let more = ring.enable_notification(memory)?;
                if chain.is_some() || !more {
                    return Ok(chain.map(|chain| (chain, more)));
                }
            }
        })
        .flatten()
    }

    /// Carries a request out, and answers how many bytes its answer has.
    fn answer(&self, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        let memory = self.memory.memory();
        let buffers = Reader::from_descriptor_chain(memory, chain.clone())
            .and_then(|request| Ok((request, VirtioFsWriter::new(memory, chain)?)));
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let cache: Option<&mut dyn FsCacheReqHandler> = None;
        let answered = match buffers {
            Ok((request, answer)) => self.server.handle_message(request, Writer::VirtioFs(answer), cache, None).ok(),
            Err(_) => None,
        };
        if answered.is_none() {
            self.counters.broken_requests.fetch_add(1, Ordering::Relaxed);
        }
        answered.and_then(|length| length.try_into().ok()).unwrap_or(0)
    }

    fn give_back(&self, index: usize, head: u16, length: u32) {
        let wants_interrupt = self.with_ring(index, |ring| {
            ring.add_used(self.memory.memory(), head, length)?;
            ring.needs_notification(self.memory.memory())
        });
        if wants_interrupt == Some(true) {
            self.interrupt.used_buffers();
        }
    }

    /// Uses a queue, which ends for this driver with its first error.
    fn with_ring<T>(
        &self,
        index: usize,
        use_ring: impl FnOnce(&mut Queue) -> Result<T, virtio_queue_017::Error>,
    ) -> Option<T> {
        let mut slot = self.lock(index)?;
        let used = use_ring(slot.as_mut()?);
        match used {
            Ok(value) => Some(value),
            Err(error) => {
                warn!(queue = index, %error, "the guest's file system queue is broken, its share stops");
                *slot = None;
                None
            }
        }
    }

    fn lock(&self, index: usize) -> Option<MutexGuard<'_, Option<Queue>>> {
        // A queue is valid at every step.
        Some(self.rings.get(index)?.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Guest memory as the file server's library knows it: an older version of the same crate.
struct SharedMemory {
    memory: GuestMemoryMmap,
    /// Keeps the mappings.
    _mappings: GuestMemory,
}

impl SharedMemory {
    fn new(mappings: GuestMemory) -> Result<Self, ActivateError> {
        let regions = mappings.iter().map(|region| {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
            // SAFETY: the region is mapped for as long as `mappings` lives, which is dropped after what is made here, and
            // nothing in this process has a reference into it.
            let mapping = unsafe { MmapRegion::build_raw(region.as_ptr(), region.len() as usize, protection, flags) }?;
            let start = GuestAddress(region.start_addr().0);
            GuestRegionMmap::new(mapping, start).ok_or(ActivateError::from("guest memory ends beyond 64 bits"))
        });
        let memory = GuestMemoryMmap::from_regions(regions.collect::<Result<_, _>>()?)?;
        Ok(Self { memory, _mappings: mappings })
    }

    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

/// The same queue as that library knows it.
fn ring(queue: &virtio_queue::Queue, event_idx: bool) -> Result<Mutex<Option<Queue>>, virtio_queue_017::Error> {
    if !queue.ready() {
        return Ok(Mutex::new(None));
    }
    let mut ring = Queue::new(queue.max_size())?;
    ring.try_set_size(queue.size())?;
    ring.try_set_desc_table_address(GuestAddress(queue.desc_table()))?;
    ring.try_set_avail_ring_address(GuestAddress(queue.avail_ring()))?;
    ring.try_set_used_ring_address(GuestAddress(queue.used_ring()))?;
    ring.set_next_avail(queue.next_avail());
    ring.set_next_used(queue.next_used());
    ring.set_event_idx(event_idx);
    ring.set_ready(true);
    Ok(Mutex::new(Some(ring)))
}

#[cfg(test)]
#[path = "in_process_tests.rs"]
mod tests;
