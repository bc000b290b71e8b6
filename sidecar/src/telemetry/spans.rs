//! Finished spans on their way to the collector, over OTLP (`opentelemetry-otlp`).
//!
//! A worker puts a span into a bounded queue and goes on; what does not fit is dropped and counted. One task,
//! apart from the workers, sends them in batches. A collector that is away costs spans, never requests: what the
//! exporter could not deliver within its timeout is dropped and counted too, and said once in the log.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow, bail};
use hyper::http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::KeyValue;
use opentelemetry_otlp::{
    Protocol, SpanExporter, WithExportConfig, WithHttpConfig, WithTonicConfig,
    tonic_types::metadata::MetadataMap,
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

use super::{
    metrics::Metrics,
    settings::{ExportSettings, OtlpProtocol, TraceSettings},
};

/// The workers' side of the queue. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Spans {
    queue: mpsc::Sender<Message>,
    metrics: Arc<Metrics>,
}

/// The task that sends spans to the collector.
#[derive(Debug)]
pub struct SpanExport {
    queue: mpsc::Receiver<Message>,
    settings: ExportSettings,
    resource: Resource,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
enum Message {
    Span(Box<SpanData>),
    /// Send what you have, then answer.
    Flush(oneshot::Sender<()>),
}

impl Spans {
    /// The queue and the task at its end; none where nothing is exported.
    pub fn new(settings: &TraceSettings, metrics: &Arc<Metrics>) -> Option<(Spans, SpanExport)> {
        let export = settings.export.clone()?;
        let (sender, receiver) = mpsc::channel(export.queue);
        let attributes =
            settings.resource.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
        let resource = Resource::builder_empty()
            .with_attributes(attributes)
            .with_attribute(KeyValue::new("telemetry.sdk.language", "rust"))
            .with_attribute(KeyValue::new("telemetry.distro.name", "weft"))
            .with_attribute(KeyValue::new("telemetry.distro.version", env!("CARGO_PKG_VERSION")))
            .with_service_name(settings.service_name.clone())
            .build();
        let task = SpanExport { queue: receiver, settings: export, resource, metrics: metrics.clone() };
        Some((Spans { queue: sender, metrics: metrics.clone() }, task))
    }

    /// Hands a finished span over. Never waits.
    pub fn finished(&self, span: SpanData) {
        if self.queue.try_send(Message::Span(Box::new(span))).is_err() {
            self.metrics.spans_dropped("queue_full", 1);
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
    /// Sends batches until every [`Spans`] is dropped. Fails where the settings do not make an exporter.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut exporter = exporter(&self.settings)?;
        exporter.set_resource(&self.resource);
        let mut reachable = true;
        loop {
            let (batch, asked, open) = self.next_batch().await;
            if !batch.is_empty() {
                reachable = self.send(&exporter, batch, reachable).await;
            }
            if let Some(done) = asked {
                let _ = done.send(());
            }
            if !open {
                return Ok(());
            }
        }
    }

    /// Collects until the batch is full, its first span has waited long enough, somebody wants a flush, or
    /// the queue is closed.
    async fn next_batch(&mut self) -> (Vec<SpanData>, Option<oneshot::Sender<()>>, bool) {
        let mut batch = Vec::new();
        let mut deadline = None;
        while batch.len() < self.settings.batch {
            let message = match deadline {
                None => self.queue.recv().await,
                Some(deadline) => match timeout_at(deadline, self.queue.recv()).await {
                    Ok(message) => message,
                    Err(_) => break,
                },
            };
            match message {
                Some(Message::Span(span)) => {
                    batch.push(*span);
                    deadline.get_or_insert_with(|| Instant::now() + self.settings.delay);
                }
                Some(Message::Flush(done)) => return (batch, Some(done), true),
                None => return (batch, None, false),
            }
        }
        (batch, None, true)
    }

    /// Sends one batch; returns whether the collector took it. Speaks only when that changes.
    async fn send(&self, exporter: &SpanExporter, batch: Vec<SpanData>, reachable: bool) -> bool {
        let count = batch.len();
        let sent = timeout(self.settings.timeout, exporter.export(batch)).await;
        let error = match sent {
            Ok(Ok(())) => {
                self.metrics.spans_sent(count);
                if !reachable {
                    tracing::info!(
                        endpoint = self.settings.endpoint,
                        "the trace collector takes spans again"
                    );
                }
                return true;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.settings.timeout),
        };
        self.metrics.spans_dropped("export_failed", count);
        if reachable {
            tracing::warn!(
                endpoint = self.settings.endpoint,
                error,
                "the trace collector took no spans; dropping and counting them until it does"
            );
        }
        false
    }
}

fn exporter(settings: &ExportSettings) -> anyhow::Result<SpanExporter> {
    let refused = || format!("cannot export spans to {}", settings.endpoint);
    let protocol = match settings.protocol {
        OtlpProtocol::Grpc => {
            return SpanExporter::builder()
                .with_tonic()
                .with_endpoint(&settings.endpoint)
                .with_timeout(settings.timeout)
                .with_metadata(MetadataMap::from_headers(headers(&settings.headers)?))
                .build()
                .with_context(refused);
        }
        OtlpProtocol::HttpProtobuf => Protocol::HttpBinary,
        OtlpProtocol::HttpJson => Protocol::HttpJson,
    };
    headers(&settings.headers)?;
    SpanExporter::builder()
        .with_http()
        .with_protocol(protocol)
        .with_endpoint(&settings.endpoint)
        .with_timeout(settings.timeout)
        .with_headers(settings.headers.iter().cloned().collect())
        .build()
        .with_context(refused)
}

/// The exporter leaves out headers that are not valid; we refuse them. Their values may be secret.
fn headers(pairs: &[(String, String)]) -> anyhow::Result<HeaderMap> {
    let mut map = HeaderMap::new();
    for (name, value) in pairs {
        let refused = || anyhow!("OTEL_EXPORTER_OTLP_HEADERS: {name:?} is not a header with a valid value");
        let Ok(name) = HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes()) else { bail!(refused()) };
        map.insert(name, HeaderValue::from_str(value).map_err(|_| refused())?);
    }
    Ok(map)
}

#[cfg(test)]
impl SpanExport {
    /// What was handed over and not yet taken.
    pub(super) fn waiting(&mut self) -> Vec<SpanData> {
        let mut spans = Vec::new();
        while let Ok(Message::Span(span)) = self.queue.try_recv() {
            spans.push(*span);
        }
        spans
    }
}
