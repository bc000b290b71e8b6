//! The `OTEL_*` variables, as the
//! [OpenTelemetry specification](https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/)
//! defines them. A pure function of the variables. An unusable value is reported and its default taken, as that
//! specification wants it: these variables are often set for the app, and must not stop the sidecar.

use std::{str::FromStr, time::Duration};

use super::{
    propagation::Propagators,
    trace::{Formats, Sampler},
};

/// How traces are made and where they go.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceSettings {
    /// `service.name` of the resource.
    pub service_name: String,
    /// Further attributes of the resource.
    pub resource: Vec<(String, String)>,
    /// Which headers are read and written.
    pub propagators: Propagators,
    /// Which traces are recorded.
    pub sampler: Sampler,
    /// Where spans go; none: nowhere.
    pub export: Option<ExportSettings>,
}

/// Where spans go, and in what portions.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportSettings {
    /// How they are carried.
    pub protocol: OtlpProtocol,
    /// The whole URL.
    pub endpoint: String,
    /// Sent with each batch. May be secret.
    pub headers: Vec<(String, String)>,
    /// For one batch, its repetitions included.
    pub timeout: Duration,
    /// Finished spans that may wait; more are dropped and counted.
    pub queue: usize,
    /// Spans in one batch, at most.
    pub batch: usize,
    /// How long a span waits for its batch to fill, at most.
    pub delay: Duration,
}

/// How OTLP is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// gRPC.
    Grpc,
    /// HTTP with protobuf bodies.
    HttpProtobuf,
    /// HTTP with JSON bodies.
    HttpJson,
}

impl TraceSettings {
    /// Reads the variables. `service` stands for a missing `OTEL_SERVICE_NAME`. Also returns what was wrong,
    /// each with the name of the variable, the value, and what was expected.
    pub fn read(variable: impl Fn(&str) -> Option<String>, service: &str) -> (TraceSettings, Vec<String>) {
        let mut reader = Reader { variable: &variable, problems: Vec::new() };
        let mut resource = reader.pairs("OTEL_RESOURCE_ATTRIBUTES");
        let named = resource.iter().position(|(name, _)| name == "service.name");
        let named = named.map(|at| resource.swap_remove(at).1);
        let settings = TraceSettings {
            service_name: reader.text("OTEL_SERVICE_NAME").or(named).unwrap_or_else(|| service.to_owned()),
            resource,
            propagators: reader.propagators(),
            sampler: reader.sampler(),
            export: reader.export(),
        };
        (settings, reader.problems)
    }
}

struct Reader<'a> {
    variable: &'a dyn Fn(&str) -> Option<String>,
    problems: Vec<String>,
}

impl Reader<'_> {
    /// An empty value counts as unset.
    fn text(&self, name: &str) -> Option<String> {
        (self.variable)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn problem(&mut self, name: &str, value: &str, expected: &str) {
        self.problems.push(format!("{name} is {value:?}; expected {expected}; taking the default"));
    }

    fn number(&mut self, name: &str, default: u64, most: u64) -> u64 {
        let Some(text) = self.text(name) else { return default };
        match text.parse() {
            Ok(number) if (1..=most).contains(&number) => number,
            _ => {
                self.problem(name, &text, &format!("a whole number from 1 to {most}"));
                default
            }
        }
    }

    /// `key1=value1,key2=value2`, values percent-encoded (W3C Baggage 3.3 without properties).
    fn pairs(&mut self, name: &str) -> Vec<(String, String)> {
        let Some(text) = self.text(name) else { return Vec::new() };
        let mut pairs = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.split_once('=').map(|(key, value)| (key.trim(), percent_decoded(value.trim()))) {
                Some((key, Some(value))) if !key.is_empty() => pairs.push((key.to_owned(), value)),
                // The value may be a secret: it is not shown.
                _ => self.problems.push(format!("{name}: one part is not `key=value`; leaving it out")),
            }
        }
        pairs
    }

    fn propagators(&mut self) -> Propagators {
        const NAME: &str = "OTEL_PROPAGATORS";
        let Some(text) = self.text(NAME) else { return Propagators::DEFAULT };
        let b3 = Formats::B3_SINGLE.and(Formats::B3_MULTI);
        let mut chosen = Propagators { read: Formats::NONE, always: Formats::NONE, ..Propagators::DEFAULT };
        for name in text.split(',').map(str::trim) {
            let (read, always) = match name {
                "tracecontext" => (Formats::W3C, Formats::W3C),
                "b3" => (b3, Formats::B3_SINGLE),
                "b3multi" => (b3, Formats::B3_MULTI),
                "jaeger" => (Formats::JAEGER, Formats::JAEGER),
                // Baggage passes untouched in any case.
                "baggage" | "none" => continue,
                _ => {
                    self.problem(NAME, name, "tracecontext, baggage, b3, b3multi, jaeger or none");
                    return Propagators::DEFAULT;
                }
            };
            chosen.read = chosen.read.and(read);
            chosen.always = chosen.always.and(always);
        }
        chosen
    }

    fn sampler(&mut self) -> Sampler {
        const NAME: &str = "OTEL_TRACES_SAMPLER";
        let Some(name) = self.text(NAME) else {
            return Sampler { ratio: self.ratio(Sampler::DEFAULT.ratio), ..Sampler::DEFAULT };
        };
        let (parent_based, kind) = match name.strip_prefix("parentbased_") {
            Some(kind) => (true, kind),
            None => (false, name.as_str()),
        };
        let ratio = match kind {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => self.ratio(1.0),
            _ => {
                self.problem(
                    NAME,
                    &name,
                    "always_on, always_off or traceidratio, or parentbased_ before one",
                );
                return Sampler::DEFAULT;
            }
        };
        Sampler { parent_based, ratio }
    }

    fn ratio(&mut self, default: f64) -> f64 {
        const NAME: &str = "OTEL_TRACES_SAMPLER_ARG";
        let Some(text) = self.text(NAME) else { return default };
        match text.parse() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => ratio,
            _ => {
                self.problem(NAME, &text, "a number from 0 to 1");
                default
            }
        }
    }

    fn export(&mut self) -> Option<ExportSettings> {
        if self.text("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return None;
        }
        match self.text("OTEL_TRACES_EXPORTER").as_deref() {
            None | Some("otlp") => {}
            Some("none") => return None,
            Some(other) => {
                let expected = "otlp or none";
                self.problem("OTEL_TRACES_EXPORTER", other, expected);
            }
        }
        let protocol = self.protocol();
        let endpoint = self.endpoint(protocol)?;
        let headers_name = self.traces_or_general("HEADERS").map(|(name, _)| name);
        let headers = headers_name.map(|name| self.pairs(&name)).unwrap_or_default();
        let timeout_name = self.traces_or_general("TIMEOUT").map(|(name, _)| name);
        let timeout = timeout_name.map_or(10_000, |name| self.number(&name, 10_000, 600_000));
        let queue = self.number("OTEL_BSP_MAX_QUEUE_SIZE", 2048, 65_536) as usize;
        let batch = self.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, 65_536) as usize;
        let whole = self.number("OTEL_BSP_EXPORT_TIMEOUT", 30_000, 600_000);
        Some(ExportSettings {
            protocol,
            endpoint,
            headers,
            timeout: Duration::from_millis(timeout.min(whole)),
            queue,
            batch: batch.min(queue),
            delay: Duration::from_millis(self.number("OTEL_BSP_SCHEDULE_DELAY", 5000, 600_000)),
        })
    }

    /// The variable for traces, or else the one for all signals.
    fn traces_or_general(&self, end: &str) -> Option<(String, String)> {
        [format!("OTEL_EXPORTER_OTLP_TRACES_{end}"), format!("OTEL_EXPORTER_OTLP_{end}")]
            .into_iter()
            .find_map(|name| self.text(&name).map(|value| (name, value)))
    }

    fn protocol(&mut self) -> OtlpProtocol {
        let Some((name, text)) = self.traces_or_general("PROTOCOL") else {
            return OtlpProtocol::HttpProtobuf;
        };
        text.parse().unwrap_or_else(|()| {
            self.problem(&name, &text, "grpc, http/protobuf or http/json");
            OtlpProtocol::HttpProtobuf
        })
    }

    /// None without a variable: unlike an app's SDK, the sidecar sends nothing to a collector nobody named.
    fn endpoint(&mut self, protocol: OtlpProtocol) -> Option<String> {
        let (name, text) = self.traces_or_general("ENDPOINT")?;
        let insecure = self.traces_or_general("INSECURE").is_some_and(|(_, value)| value == "true");
        let mut url = match text.split_once("://") {
            Some(_) => text.clone(),
            None if insecure => format!("http://{text}"),
            None => format!("https://{text}"),
        };
        let valid = url.parse::<hyper::Uri>().is_ok_and(|uri| uri.host().is_some());
        if !url.starts_with("http://") || !valid {
            self.problems.push(format!(
                "{name} is {text:?}; expected http://HOST:PORT (TLS to the collector is not supported: use a \
                 collector on this host or in this cluster); no spans are exported"
            ));
            return None;
        }
        if protocol != OtlpProtocol::Grpc && !name.contains("_TRACES_") {
            url = format!("{}/v1/traces", url.trim_end_matches('/'));
        }
        Some(url)
    }
}

impl FromStr for OtlpProtocol {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "grpc" => Ok(OtlpProtocol::Grpc),
            "http/protobuf" => Ok(OtlpProtocol::HttpProtobuf),
            "http/json" => Ok(OtlpProtocol::HttpJson),
            _ => Err(()),
        }
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        if *first == b'%' {
            let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok())?;
            let valid = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            bytes.push(valid.then(|| u8::from_str_radix(digits, 16).ok())??);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;
