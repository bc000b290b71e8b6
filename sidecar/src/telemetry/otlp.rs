//! Spans as messages of [OTLP](https://opentelemetry.io/docs/specs/otlp/) in protobuf, written straight from what
//! a record remembers: `opentelemetry.proto.trace.v1`, `common.v1` and `collector.trace.v1`.
//!
//! The generated types want a `String` for every key and value, which costs many times what the bytes do. So a
//! span is written here field by field, with prost's encoding, and what stands around the spans is a message whose
//! parts are bytes: on the wire there is no difference. Generated types make what is made once, and tests read
//! everything back with them.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
    resource::v1::Resource,
    trace::v1::{SpanFlags, span::SpanKind, status::StatusCode},
};
use prost::{
    Message,
    encoding::{WireType, encode_varint, encoded_len_varint},
};

use super::{settings::TraceSettings, trace::TraceContext};

/// Attributes of a span, encoded: a span in the making, as the order of its fields is free.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<u8>);

/// What a span has beside its attributes.
pub(super) struct SpanFields<'a> {
    pub trace: &'a TraceContext,
    pub kind: SpanKind,
    /// In parts.
    pub name: &'a [&'a str],
    /// Beginning and end.
    pub times: (SystemTime, SystemTime),
    /// What went wrong, where something did.
    pub error: Option<&'a str>,
}

/// `ExportTraceServiceRequest` with the spans of one resource. Cheap to clone.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ExportRequest {
    #[prost(bytes = "bytes", tag = "1")]
    resource_spans: Bytes,
}

/// `ResourceSpans` and within it `ScopeSpans`: what is the same for all spans, and a place for them.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Origin {
    #[prost(bytes = "bytes", tag = "1")]
    resource: Bytes,
    #[prost(message, required, tag = "2")]
    scope_spans: ScopeSpans,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(bytes = "bytes", tag = "1")]
    scope: Bytes,
    #[prost(bytes = "vec", repeated, tag = "2")]
    spans: Vec<Vec<u8>>,
}

/// Numbers of the fields of `Span`.
const TRACE_ID: u32 = 1;
const SPAN_ID: u32 = 2;
const PARENT_SPAN_ID: u32 = 4;
const NAME: u32 = 5;
const KIND: u32 = 6;
const START_TIME: u32 = 7;
const END_TIME: u32 = 8;
const ATTRIBUTES: u32 = 9;
const STATUS: u32 = 15;
const FLAGS: u32 = 16;
/// Those of `Status`.
const MESSAGE: u32 = 2;
const CODE: u32 = 3;
/// Those of `KeyValue`.
const KEY: u32 = 1;
const VALUE: u32 = 2;
/// Those of `AnyValue`.
const TEXT: u32 = 1;
const NUMBER: u32 = 3;

/// Room for the attributes that the spans of a request have in common, as a rule.
const COMMON_BYTES: usize = 512;
/// The same for what else is in a span.
const SPAN_BYTES: usize = 512;
/// `sampled` of the trace flags.
const SAMPLED: u32 = 1;

impl Attributes {
    /// None yet, and room for the usual.
    pub fn new() -> Attributes {
        Attributes(Vec::with_capacity(COMMON_BYTES + SPAN_BYTES))
    }

    /// The same, to be continued.
    pub fn to_be_continued(&self) -> Attributes {
        let mut bytes = Vec::with_capacity(self.0.len() + SPAN_BYTES);
        bytes.extend_from_slice(&self.0);
        Attributes(bytes)
    }

    /// Adds a text.
    pub fn text(&mut self, key: &str, value: &str) {
        self.begin(key, field_len(value.len()));
        put_bytes(&mut self.0, TEXT, value.as_bytes());
    }

    /// Adds a number.
    pub fn number(&mut self, key: &str, value: i64) {
        // Negative numbers take ten bytes (protobuf, base 128 varints); there are none here.
        let value = value as u64;
        self.begin(key, 1 + encoded_len_varint(value));
        put_number(&mut self.0, NUMBER, value);
    }

    /// All but the value, which has this length.
    fn begin(&mut self, key: &str, value: usize) {
        put_head(&mut self.0, ATTRIBUTES, field_len(key.len()) + field_len(value));
        put_bytes(&mut self.0, KEY, key.as_bytes());
        put_head(&mut self.0, VALUE, value);
    }

    /// The whole span.
    pub fn into_span(self, fields: &SpanFields<'_>) -> Vec<u8> {
        let SpanFields { trace, kind, name, times: (start, end), error } = *fields;
        let mut span = self.0;
        put_bytes(&mut span, TRACE_ID, &trace.trace_id.to_be_bytes());
        put_bytes(&mut span, SPAN_ID, &trace.span_id.to_be_bytes());
        if trace.parent_id != 0 {
            put_bytes(&mut span, PARENT_SPAN_ID, &trace.parent_id.to_be_bytes());
        }
        put_head(&mut span, NAME, name.iter().map(|part| part.len()).sum());
        name.iter().for_each(|part| span.extend_from_slice(part.as_bytes()));
        put_number(&mut span, KIND, kind as u64);
        put_time(&mut span, START_TIME, start);
        // A clock that was set back must not make a span end before it began.
        put_time(&mut span, END_TIME, end.max(start));
        if let Some(message) = error {
            let code = StatusCode::Error as u64;
            put_head(&mut span, STATUS, field_len(message.len()) + 1 + encoded_len_varint(code));
            put_bytes(&mut span, MESSAGE, message.as_bytes());
            put_number(&mut span, CODE, code);
        }
        let remote = if trace.parent_is_remote { SpanFlags::ContextIsRemoteMask as u32 } else { 0 };
        let flags = SAMPLED | SpanFlags::ContextHasIsRemoteMask as u32 | remote;
        put_key(&mut span, FLAGS, WireType::ThirtyTwoBit);
        span.extend_from_slice(&flags.to_le_bytes());
        span
    }
}

impl Origin {
    /// The resource of these settings, and our scope.
    pub fn new(settings: &TraceSettings) -> Origin {
        let given = settings.resource.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let own = [
            ("telemetry.sdk.language", "rust"),
            ("telemetry.distro.name", "weft"),
            ("telemetry.distro.version", env!("CARGO_PKG_VERSION")),
            ("service.name", &settings.service_name),
        ];
        // Each key once: the last one counts.
        let attributes: BTreeMap<&str, &str> = given.chain(own).collect();
        let attributes = attributes.into_iter().map(|(key, value)| KeyValue {
            key: key.to_owned(),
            value: Some(AnyValue { value: Some(Value::StringValue(value.to_owned())) }),
            ..KeyValue::default()
        });
        let resource = Resource { attributes: attributes.collect(), ..Resource::default() };
        let scope = InstrumentationScope {
            name: "weft-sidecar".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        let scope_spans = ScopeSpans { scope: scope.encode_to_vec().into(), spans: Vec::new() };
        Origin { resource: resource.encode_to_vec().into(), scope_spans }
    }

    /// A request with these spans.
    pub fn request(&self, spans: Vec<Vec<u8>>) -> ExportRequest {
        let scope_spans = ScopeSpans { scope: self.scope_spans.scope.clone(), spans };
        let whole = Origin { resource: self.resource.clone(), scope_spans };
        ExportRequest { resource_spans: whole.encode_to_vec().into() }
    }
}

impl ExportRequest {
    /// In OTLP's JSON, by way of the generated types.
    ///
    /// # Errors
    /// None that is known.
    pub fn json(&self) -> anyhow::Result<Vec<u8>> {
        let request = ExportTraceServiceRequest::decode(self.encode_to_vec().as_slice())?;
        Ok(serde_json::to_vec(&request)?)
    }
}

/// Length of a field of bytes whose number is below 16.
fn field_len(bytes: usize) -> usize {
    1 + encoded_len_varint(bytes as u64) + bytes
}

fn put_bytes(buffer: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    put_head(buffer, field, bytes.len());
    buffer.extend_from_slice(bytes);
}

/// All of a field of so many bytes but these.
fn put_head(buffer: &mut Vec<u8>, field: u32, length: usize) {
    put_key(buffer, field, WireType::LengthDelimited);
    put_varint(buffer, length as u64);
}

fn put_number(buffer: &mut Vec<u8>, field: u32, number: u64) {
    put_key(buffer, field, WireType::Varint);
    put_varint(buffer, number);
}

fn put_key(buffer: &mut Vec<u8>, field: u32, wire: WireType) {
    put_varint(buffer, u64::from(field << 3 | wire as u32));
}

/// Nearly all are one byte, for which prost's loop is slow.
fn put_varint(buffer: &mut Vec<u8>, number: u64) {
    match u8::try_from(number) {
        Ok(byte @ 0..=0x7f) => buffer.push(byte),
        _ => encode_varint(number, buffer),
    }
}

fn put_time(buffer: &mut Vec<u8>, field: u32, time: SystemTime) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    // Until the year 2554.
    let nanoseconds = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    put_key(buffer, field, WireType::SixtyFourBit);
    buffer.extend_from_slice(&nanoseconds.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use opentelemetry_proto::tonic::trace::v1::Span;

    use super::*;
    use crate::telemetry::Formats;

    #[test]
    fn what_is_written_is_what_the_generated_types_read() {
        let trace = TraceContext {
            trace_id: 7,
            span_id: u64::MAX,
            parent_id: 0,
            parent_is_remote: false,
            sampled: true,
            debug: false,
            decided: false,
            undecided: Formats::NONE,
            formats: Formats::NONE,
        };
        let texts = ["", "a", &"b".repeat(127), &"c".repeat(128), &"d".repeat(17_000), "\u{1f980}"];
        let numbers = [0, 1, 127, 128, 65_535, i64::MAX, -1];
        let mut attributes = Attributes::new();
        texts.iter().for_each(|text| attributes.text(&format!("text {text}"), text));
        numbers.iter().for_each(|number| attributes.number("number", *number));
        let start = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
        let fields = SpanFields {
            trace: &trace,
            kind: SpanKind::Client,
            name: &["GET", " ", "orders"],
            times: (start, start - Duration::from_secs(1)),
            error: Some(texts[4]),
        };
        let span = Span::decode(attributes.to_be_continued().into_span(&fields).as_slice()).unwrap();

        let mut expected: Vec<_> = texts
            .iter()
            .map(|text| (format!("text {text}"), Value::StringValue((*text).to_owned())))
            .collect();
        expected.extend(numbers.map(|number| ("number".to_owned(), Value::IntValue(number))));
        let found: Vec<_> = span
            .attributes
            .into_iter()
            .map(|attribute| (attribute.key, attribute.value.unwrap().value.unwrap()))
            .collect();
        assert_eq!(found, expected);
        assert_eq!(span.trace_id, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!((span.span_id, span.parent_span_id), (vec![255; 8], vec![]));
        assert_eq!((span.name.as_str(), span.kind), ("GET orders", SpanKind::Client as i32));
        assert_eq!(span.start_time_unix_nano, 1_700_000_000_123_456_789);
        assert_eq!(span.end_time_unix_nano, span.start_time_unix_nano, "no span ends before it began");
        let status = span.status.unwrap();
        assert_eq!((status.message.as_str(), status.code), (texts[4], StatusCode::Error as i32));
        let fields = SpanFields { error: None, ..fields };
        assert_eq!(Span::decode(Attributes::new().into_span(&fields).as_slice()).unwrap().status, None);
    }

    #[test]
    fn the_resource_has_each_key_once() {
        let variables = HashMap::from([
            ("OTEL_RESOURCE_ATTRIBUTES", "zone=a,zone=b,telemetry.distro.name=other,service.name=unused"),
            ("OTEL_SERVICE_NAME", "shop"),
        ]);
        let read = |name: &str| variables.get(name).map(|value| (*value).to_owned());
        let (settings, _) = TraceSettings::read(read, "orders");
        let request = Origin::new(&settings).request(vec![vec![], vec![]]);
        let request = ExportTraceServiceRequest::decode(request.encode_to_vec().as_slice()).unwrap();
        let [resource_spans] = &request.resource_spans[..] else { panic!("{request:?}") };
        let [scope_spans] = &resource_spans.scope_spans[..] else { panic!("{request:?}") };
        assert_eq!(scope_spans.scope.as_ref().unwrap().name, "weft-sidecar");
        assert_eq!(scope_spans.spans, [Span::default(), Span::default()]);
        let attributes = &resource_spans.resource.as_ref().unwrap().attributes;
        let text = |attribute: &KeyValue| match attribute.value.clone().unwrap().value {
            Some(Value::StringValue(text)) => (attribute.key.clone(), text),
            other => panic!("{other:?}"),
        };
        let found: Vec<_> = attributes.iter().map(text).collect();
        let expected = [
            ("service.name", "shop"),
            ("telemetry.distro.name", "weft"),
            ("telemetry.distro.version", env!("CARGO_PKG_VERSION")),
            ("telemetry.sdk.language", "rust"),
            ("zone", "b"),
        ];
        assert_eq!(found, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
}
