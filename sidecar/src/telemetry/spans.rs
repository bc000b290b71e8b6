//! Finished spans on their way to the collector.
//!
//! A worker adds a span, encoded, to the batch that is open; a full batch goes into a bounded queue, and what
//! finds both full is dropped and counted. One task, apart from the workers, sends the batches, and at intervals
//! the open one: it is woken for a batch, not for a span. A collector that is away costs spans, never requests:
//! what could not be delivered in time is dropped and counted too, and said once in the log.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

use super::{
    collector::Collector,
    metrics::Metrics,
    otlp::Origin,
    settings::{ExportSettings, TraceSettings},
};

/// Spans, each encoded.
type Batch = Vec<Vec<u8>>;

/// The workers' side. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Spans {
    open: Arc<Mutex<Batch>>,
    queue: mpsc::Sender<Message>,
    batch: usize,
    metrics: Arc<Metrics>,
}

/// The task that sends spans to the collector.
#[derive(Debug)]
pub struct SpanExport {
    open: Arc<Mutex<Batch>>,
    queue: mpsc::Receiver<Message>,
    settings: ExportSettings,
    origin: Origin,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
enum Message {
    Full(Batch),
    /// Send what you have, then answer.
    Flush(oneshot::Sender<()>),
}

impl Spans {
    /// The workers' side and the task; none where nothing is exported.
    pub fn new(settings: &TraceSettings, metrics: &Arc<Metrics>) -> Option<(Spans, SpanExport)> {
        let export = settings.export.clone()?;
        // One more batch is the open one. The queue has at least one place, and every batch one span.
        let batch = export.batch.min(export.queue / 2).max(1);
        let (sender, receiver) = mpsc::channel((export.queue / batch).saturating_sub(1).max(1));
        let open = Arc::new(Mutex::default());
        let spans = Spans { open: open.clone(), queue: sender, batch, metrics: metrics.clone() };
        let origin = Origin::new(settings);
        let task = SpanExport { open, queue: receiver, settings: export, origin, metrics: metrics.clone() };
        Some((spans, task))
    }

    /// Hands a finished span over. Never waits.
    pub fn finished(&self, span: Vec<u8>) {
        let mut open = lock(&self.open);
        self.close_full(&mut open);
        if open.len() >= self.batch {
            drop(open);
            self.metrics.spans_dropped("queue_full", 1);
            return;
        }
        open.push(span);
        self.close_full(&mut open);
    }

    /// Puts the open batch into the queue if it is full and there is a place.
    fn close_full(&self, open: &mut Batch) {
        if open.len() >= self.batch
            && let Ok(place) = self.queue.try_reserve()
        {
            place.send(Message::Full(std::mem::take(open)));
        }
    }

    /// Waits until every span handed over so far was sent or given up, but not longer than this.
    pub async fn flush(&self, longest: Duration) {
        let (done, wait) = oneshot::channel();
        let flushed = async {
            if self.queue.send(Message::Flush(done)).await.is_ok() {
                // The error means that the task ended: there is nothing left to wait for.
                let _ = wait.await;
            }
        };
        let _ = timeout(longest, flushed).await;
    }
}

impl SpanExport {
    /// Sends batches until every [`Spans`] is dropped. Fails where the settings do not make a client.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let collector = Collector::new(&self.settings)?;
        let mut due = Instant::now() + self.settings.delay;
        let mut reachable = true;
        loop {
            let message = timeout_at(due, self.queue.recv()).await;
            let (batch, asked, closed) = match message {
                Ok(Some(Message::Full(batch))) => (batch, None, false),
                Ok(Some(Message::Flush(done))) => (self.take_open(), Some(done), false),
                Ok(None) => (self.take_open(), None, true),
                Err(_) => {
                    due = Instant::now() + self.settings.delay;
                    (self.take_open(), None, false)
                }
            };
            if !batch.is_empty() {
                reachable = self.send(&collector, batch, reachable).await;
            }
            if let Some(done) = asked {
                let _ = done.send(());
            }
            if closed {
                return Ok(());
            }
        }
    }

    fn take_open(&self) -> Batch {
        std::mem::take(&mut *lock(&self.open))
    }

    /// Sends one batch; returns whether the collector took it. Speaks only when that changes.
    async fn send(&self, collector: &Collector, batch: Batch, reachable: bool) -> bool {
        let count = batch.len();
        let sent = collector.send(&self.origin.request(batch)).await;
        let endpoint = &self.settings.endpoint;
        let Err(error) = sent else {
            self.metrics.spans_sent(count);
            if !reachable {
                tracing::info!(endpoint, "the trace collector takes spans again");
            }
            return true;
        };
        self.metrics.spans_dropped("export_failed", count);
        if reachable {
            tracing::warn!(
                endpoint,
                error,
                "the trace collector took no spans; dropping and counting them until it does"
            );
        }
        false
    }
}

/// A panic elsewhere leaves the batch as it was: whole spans.
fn lock(batch: &Mutex<Batch>) -> MutexGuard<'_, Batch> {
    batch.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
impl SpanExport {
    /// What was handed over and not yet taken.
    pub(super) fn waiting(&mut self) -> Vec<Vec<u8>> {
        let mut spans = Vec::new();
        while let Ok(Message::Full(batch)) = self.queue.try_recv() {
            spans.extend(batch);
        }
        spans.extend(self.take_open());
        spans
    }
}
