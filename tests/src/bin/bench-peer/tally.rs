//! What a generator counted, shared by the tasks of one thread, and how it is printed. Latencies in microseconds.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use tokio::time::Instant;

/// Counts of all tasks of a generator.
#[derive(Default)]
pub struct Tally {
    latencies: RefCell<Vec<u32>>,
    errors: Cell<u64>,
    bytes: Cell<u64>,
    first_error: RefCell<Option<String>>,
}

impl Tally {
    /// A tally to be shared by tasks of this thread.
    pub fn shared() -> Rc<Tally> {
        Rc::new(Tally::default())
    }

    /// A request that ended well, and how long it took.
    pub fn good(&self, took: Duration) {
        self.latencies.borrow_mut().push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
    }

    /// A request that did not; the first reason is kept.
    pub fn bad(&self, error: &anyhow::Error) {
        self.errors.set(self.errors.get() + 1);
        self.first_error.borrow_mut().get_or_insert_with(|| format!("{error:#}"));
    }

    /// Bytes of bodies or of opaque connections.
    pub fn add_bytes(&self, count: usize) {
        self.bytes.set(self.bytes.get() + count as u64);
    }

    /// One JSON object on standard output.
    pub fn print(&self, since: Instant) {
        let seconds = since.elapsed().as_secs_f64().max(1e-6);
        let mut latencies = self.latencies.take();
        latencies.sort_unstable();
        let at = |share: f64| {
            latencies.get(((latencies.len() as f64 * share) as usize).min(latencies.len().max(1) - 1))
        };
        let done = serde_json::json!({
            "requests": latencies.len(),
            "requests_per_second": latencies.len() as f64 / seconds,
            "bytes": self.bytes.get(),
            "seconds": seconds,
            "errors": self.errors.get(),
            "first_error": *self.first_error.borrow(),
            "p50_us": at(0.5),
            "p99_us": at(0.99),
            "p999_us": at(0.999),
        });
        println!("{done}");
    }
}
