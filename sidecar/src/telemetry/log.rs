//! The sidecar's own log, on standard error: what the sidecar itself does. Requests and connections are the
//! business of the access log, so that no peer can fill this one. The level can be changed while running. A standard
//! error that nobody reads costs lines, which are counted, and blocks nothing ([`Lines`]).

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    io,
    panic::{self, PanicHookInfo},
    sync::Arc,
};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};
use tracing::Dispatch;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    reload,
};
use weft_proto::lines::{FlushOnDrop, Lines, Output};

use super::metrics::Metrics;

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Changes what is logged. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LogLevel {
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Starts the log of this process. `filter` is a level (`error`, `warn`, `info`, `debug`, `trace`) or a list
/// such as `info,weft_sidecar::discovery=debug`. Fails where it is neither, or where a log was started before. What is
/// returned beside the level is to be dropped last.
pub fn init_log(
    filter: &str,
    format: LogFormat,
    metrics: &Metrics,
) -> anyhow::Result<(LogLevel, FlushOnDrop)> {
    let dropped = metrics.log_lines_dropped("own");
    let on_dropped = move || {
        dropped.inc();
    };
    let output = Output::stream(io::stderr()).context("cannot open standard error for the log")?;
    let lines = Lines::start("weft-log", output, on_dropped, log_resumed).context("cannot start the log")?;
    let lines = Arc::new(lines);
    let (log, level) = build(filter, format, lines.clone())?;
    tracing::dispatcher::set_global_default(log).context("the log of this process was started before")?;
    panic::set_hook(Box::new(log_panic));
    Ok((level, FlushOnDrop(lines)))
}

fn log_resumed(total: u64) {
    tracing::warn!("standard error takes lines again; {total} lines of this log were lost since the start");
}

/// The standard library's own would block on a standard error that nobody reads.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => tracing::error!("{panic}\n{backtrace}"),
        _ => tracing::error!("{panic}"),
    }
}

impl LogLevel {
    /// Takes another filter from now on; keeps the old one where the new one is not valid.
    pub fn set(&self, filter: &str) -> anyhow::Result<()> {
        let filter = parse(filter)?;
        self.filter.reload(filter).context("the log has ended")
    }

    /// The filter in force.
    pub fn current(&self) -> String {
        self.filter.with_current(EnvFilter::to_string).unwrap_or_default()
    }
}

/// A log that goes nowhere and is not the process's; it lives as long as the first of the two.
#[cfg(test)]
pub(crate) fn silent_log(filter: &str) -> (Dispatch, LogLevel) {
    build(filter, LogFormat::Text, io::sink).expect("a valid filter")
}

fn build(
    filter: &str,
    format: LogFormat,
    writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static,
) -> anyhow::Result<(Dispatch, LogLevel)> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let lines = match format {
        LogFormat::Text => fmt::layer().with_writer(writer).boxed(),
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(writer).boxed(),
    };
    let log = Registry::default().with(filter).with(lines);
    Ok((Dispatch::new(log), LogLevel { filter: handle }))
}

fn parse(filter: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(filter).map_err(|error| {
        anyhow!(
            "log filter {filter:?}: {error}; expected error, warn, info, debug or trace, or a list such as \
             info,weft_sidecar::discovery=debug"
        )
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    #[test]
    fn the_level_changes_while_running() {
        let lines = Lines::default();
        let writer = lines.clone();
        let (log, level) = build("info", LogFormat::Json, move || writer.clone()).unwrap();
        tracing::dispatcher::with_default(&log, || {
            tracing::debug!("hidden");
            tracing::info!(service = "orders", "shown");
            let line: serde_json::Value = serde_json::from_str(lines.take().trim()).unwrap();
            assert_eq!((&line["message"], &line["service"]), (&"shown".into(), &"orders".into()));
            level.set("debug").unwrap();
            assert_eq!(level.current(), "debug");
            tracing::debug!("now shown");
            assert!(lines.take().contains("now shown"));
            let error = level.set("weft=loud").unwrap_err();
            assert!(error.to_string().contains("weft=loud"), "{error}");
            assert_eq!(level.current(), "debug");
        });
    }
}
