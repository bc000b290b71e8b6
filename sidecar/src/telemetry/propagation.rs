//! Trace context in headers: reading what a caller sent, writing what the next one gets.
//!
//! W3C [`traceparent`/`tracestate`](https://www.w3.org/TR/trace-context/), B3 single and multi
//! ([b3-propagation](https://github.com/openzipkin/b3-propagation)), Jaeger
//! [`uber-trace-id`](https://www.jaegertracing.io/docs/1.21/client-libraries/#propagation-format). Where formats
//! disagree the first of that order wins, and all are rewritten to agree. A malformed header counts as absent
//! and is never passed on. `baggage` and `uberctx-*` are the apps' own and stay untouched.

use hyper::http::{HeaderMap, HeaderName, HeaderValue};

use super::trace::{Formats, Incoming, Parent, TraceContext};

/// Which formats are read, and which are always written (`OTEL_PROPAGATORS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Propagators {
    /// Read, passed on where found, and removed where malformed.
    pub read: Formats,
    /// Written even where the caller sent none.
    pub always: Formats,
    /// Are they written too where the trace is not recorded, and the caller did not say so? To a tracing library in
    /// the app that is an order to record nothing.
    pub unsampled: bool,
}

impl Propagators {
    /// All are read; W3C is always written, but for a negative decision of ours.
    pub const DEFAULT: Propagators =
        Propagators { read: Formats::ALL, always: Formats::W3C, unsampled: false };

    /// What the headers say about the caller's span. Allocates nothing.
    pub fn extract(&self, headers: &HeaderMap) -> Incoming {
        let mut found = Incoming::default();
        type Reader = fn(&HeaderMap) -> Option<Said>;
        let readers: [(Formats, Reader); 4] = [
            (Formats::W3C, read_w3c),
            (Formats::B3_SINGLE, read_b3_single),
            (Formats::B3_MULTI, read_b3_multi),
            (Formats::JAEGER, read_jaeger),
        ];
        let present = present(headers);
        for (format, read) in readers {
            if !self.read.has(format) || !present.has(format) {
                continue;
            }
            if let Some(said) = read(headers) {
                if found.formats == Formats::NONE || (found.parent.is_none() && said.parent.is_some()) {
                    (found.parent, found.decision, found.debug) = (said.parent, said.decision, said.debug);
                } else if said.is_of_trace(found.parent) {
                    // The same trace in a second format, which may say what the first has no word for.
                    found.decision = found.decision.or(said.decision);
                    found.debug |= said.debug;
                }
                found.formats = found.formats.and(format);
                if said.decision.is_none() && said.is_of_trace(found.parent) {
                    found.undecided = found.undecided.and(format);
                }
            }
        }
        found
    }

    /// Writes the context in the caller's formats and those always written; removes what would contradict it.
    pub fn inject(&self, context: &TraceContext, headers: &mut HeaderMap) {
        let begun = context.sampled || context.decided || self.unsampled;
        let write = if begun { context.formats.and(self.always) } else { context.formats };
        let touched = self.read.and(self.always).both(present(headers));
        if write.has(Formats::W3C) {
            headers.insert(TRACEPARENT, w3c(context));
        }
        if touched.has(Formats::W3C) && !context.formats.has(Formats::W3C) {
            // Trace Context 3.3: `tracestate` means nothing without the `traceparent` that it came with.
            headers.remove(TRACESTATE);
            if !write.has(Formats::W3C) {
                headers.remove(TRACEPARENT);
            }
        }
        if write.has(Formats::B3_SINGLE) {
            headers.insert(B3, b3_single(context));
        } else if touched.has(Formats::B3_SINGLE) {
            headers.remove(B3);
        }
        if touched.has(Formats::B3_MULTI) {
            B3_MULTI.iter().for_each(|name| drop(headers.remove(name)));
        }
        if write.has(Formats::B3_MULTI) {
            write_b3_multi(context, headers);
        }
        if write.has(Formats::JAEGER) {
            headers.insert(UBER_TRACE_ID, jaeger(context));
        } else if touched.has(Formats::JAEGER) {
            headers.remove(UBER_TRACE_ID);
        }
    }
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");
const B3_MULTI: [HeaderName; 5] = [B3_TRACE_ID, B3_SPAN_ID, B3_PARENT_SPAN_ID, B3_SAMPLED, B3_FLAGS];
const UBER_TRACE_ID: HeaderName = HeaderName::from_static("uber-trace-id");

/// The formats of which there is a header at all: most requests have those of one, or none.
fn present(headers: &HeaderMap) -> Formats {
    headers.keys().fold(Formats::NONE, |found, name| {
        found.and(match name.as_str() {
            "traceparent" | "tracestate" => Formats::W3C,
            "b3" => Formats::B3_SINGLE,
            "uber-trace-id" => Formats::JAEGER,
            name if name.starts_with("x-b3-") => Formats::B3_MULTI,
            _ => Formats::NONE,
        })
    })
}

/// What one format said.
struct Said {
    parent: Option<Parent>,
    decision: Option<bool>,
    debug: bool,
}

impl Said {
    fn is_of_trace(&self, parent: Option<Parent>) -> bool {
        self.parent.is_some_and(|own| parent.is_some_and(|parent| parent.trace_id == own.trace_id))
    }
}

/// What B3 says of whether to record.
enum B3Decision {
    Open,
    Debug,
    Sampled(bool),
}

fn read_w3c(headers: &HeaderMap) -> Option<Said> {
    let text = only(headers, TRACEPARENT)?;
    let bytes = text.as_bytes();
    // Version 00 is exactly this long; a later version may be longer, after another hyphen.
    const LENGTH: usize = 55;
    let version = lower_hex(text.get(0..2)?)?;
    let fits = match version {
        0 => bytes.len() == LENGTH,
        0xff => false,
        _ => bytes.len() == LENGTH || bytes.get(LENGTH) == Some(&b'-'),
    };
    if !fits || [2, 35, 52].iter().any(|at| bytes.get(*at) != Some(&b'-')) {
        return None;
    }
    let trace_id = lower_hex(text.get(3..35)?)?;
    let span_id = lower_hex(text.get(36..52)?)? as u64;
    let flags = lower_hex(text.get(53..55)?)?;
    Some(Said { parent: Some(parent(trace_id, span_id)?), decision: Some(flags & 1 == 1), debug: false })
}

fn w3c(context: &TraceContext) -> HeaderValue {
    let mut text = Text::new();
    text.push(b"00-").hex(context.trace_id, 32).push(b"-").hex(context.span_id.into(), 16);
    text.push(if context.sampled { b"-01" } else { b"-00" }).value()
}

/// `{trace}-{span}`, `{trace}-{span}-{sampled}`, `{trace}-{span}-{sampled}-{parent}` or `{sampled}` alone.
fn read_b3_single(headers: &HeaderMap) -> Option<Said> {
    let text = only(headers, B3)?;
    let mut parts = text.split('-');
    let (first, second) = (parts.next()?, parts.next());
    let Some(second) = second else {
        let (decision, debug) = b3_decision(first)?;
        return Some(Said { parent: None, decision: Some(decision), debug });
    };
    let parent = parent(b3_trace_id(first)?, b3_span_id(second)?)?;
    let decision = parts.next().map(b3_decision).map_or(Some(None), |decision| decision.map(Some))?;
    if let Some(grandparent) = parts.next() {
        b3_span_id(grandparent)?;
    }
    if parts.next().is_some() {
        return None;
    }
    Some(Said {
        parent: Some(parent),
        decision: decision.map(|(sampled, _)| sampled),
        debug: decision.is_some_and(|(_, debug)| debug),
    })
}

fn b3_single(context: &TraceContext) -> HeaderValue {
    let mut text = Text::new();
    text.trace_id(context.trace_id).push(b"-").hex(context.span_id.into(), 16);
    text.push(match b3_said(context, Formats::B3_SINGLE) {
        B3Decision::Open => b"",
        B3Decision::Debug => b"-d",
        B3Decision::Sampled(true) => b"-1",
        B3Decision::Sampled(false) => b"-0",
    })
    .value()
}

/// What to pass on in a format of B3: a decision that was left open is left to everybody after us too.
fn b3_said(context: &TraceContext, format: Formats) -> B3Decision {
    if context.undecided.has(format) {
        B3Decision::Open
    } else if context.debug && context.sampled {
        B3Decision::Debug
    } else {
        B3Decision::Sampled(context.sampled)
    }
}

fn read_b3_multi(headers: &HeaderMap) -> Option<Said> {
    let debug = only(headers, B3_FLAGS) == Some("1");
    let decision = match only(headers, B3_SAMPLED) {
        _ if debug => Some(true),
        // Some old clients write words.
        Some("1" | "true" | "True") => Some(true),
        Some("0" | "false" | "False") => Some(false),
        _ => None,
    };
    if !headers.contains_key(B3_TRACE_ID) {
        return decision.is_some().then_some(Said { parent: None, decision, debug });
    }
    let trace_id = b3_trace_id(only(headers, B3_TRACE_ID)?)?;
    let span_id = b3_span_id(only(headers, B3_SPAN_ID)?)?;
    Some(Said { parent: Some(parent(trace_id, span_id)?), decision, debug })
}

fn write_b3_multi(context: &TraceContext, headers: &mut HeaderMap) {
    headers.insert(B3_TRACE_ID, Text::new().trace_id(context.trace_id).value());
    headers.insert(B3_SPAN_ID, Text::new().hex(context.span_id.into(), 16).value());
    if context.parent_id != 0 {
        let parent = Text::new().hex(context.parent_id.into(), 16).value();
        headers.insert(B3_PARENT_SPAN_ID, parent);
    }
    let (name, value) = match b3_said(context, Formats::B3_MULTI) {
        B3Decision::Open => return,
        B3Decision::Debug => (B3_FLAGS, "1"),
        B3Decision::Sampled(true) => (B3_SAMPLED, "1"),
        B3Decision::Sampled(false) => (B3_SAMPLED, "0"),
    };
    headers.insert(name, HeaderValue::from_static(value));
}

/// `{trace}:{span}:{parent}:{flags}`; leading zeros may be missing; the colon may be percent-encoded.
fn read_jaeger(headers: &HeaderMap) -> Option<Said> {
    let text = only(headers, UBER_TRACE_ID)?;
    let encoded;
    let text = if text.contains('%') {
        encoded = text.replace("%3A", ":").replace("%3a", ":");
        &encoded
    } else {
        text
    };
    let mut parts = text.split(':');
    let trace_id = short_hex(parts.next()?, 32)?;
    let span_id = short_hex(parts.next()?, 16)? as u64;
    short_hex(parts.next()?, 16)?;
    let flags = short_hex(parts.next()?, 2)?;
    if parts.next().is_some() {
        return None;
    }
    let debug = flags & 3 == 3;
    Some(Said { parent: Some(parent(trace_id, span_id)?), decision: Some(flags & 1 == 1), debug })
}

fn jaeger(context: &TraceContext) -> HeaderValue {
    let mut text = Text::new();
    text.trace_id(context.trace_id).push(b":").hex(context.span_id.into(), 16);
    // The third part is deprecated and 0 by the format's own advice.
    text.push(if context.debug && context.sampled {
        b":0:3"
    } else if context.sampled {
        b":0:1"
    } else {
        b":0:0"
    })
    .value()
}

/// The value of a header that is there exactly once.
fn only(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

fn parent(trace_id: u128, span_id: u64) -> Option<Parent> {
    (trace_id != 0 && span_id != 0).then_some(Parent { trace_id, span_id })
}

/// W3C wants lowercase.
fn lower_hex(text: &str) -> Option<u128> {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')).then(|| hex(text))?
}

fn b3_trace_id(text: &str) -> Option<u128> {
    matches!(text.len(), 16 | 32).then(|| hex(text))?
}

fn b3_span_id(text: &str) -> Option<u64> {
    (text.len() == 16).then(|| hex(text))?.map(|id| id as u64)
}

fn b3_decision(text: &str) -> Option<(bool, bool)> {
    match text {
        "0" => Some((false, false)),
        "1" => Some((true, false)),
        "d" => Some((true, true)),
        _ => None,
    }
}

fn short_hex(text: &str, longest: usize) -> Option<u128> {
    (1..=longest).contains(&text.len()).then(|| hex(text))?
}

/// At most 32 hexadecimal digits; no sign, which `from_str_radix` would take.
fn hex(text: &str) -> Option<u128> {
    text.bytes()
        .try_fold(0, |number: u128, byte| Some(number << 4 | u128::from(char::from(byte).to_digit(16)?)))
}

/// A header value in the making, on the stack.
struct Text {
    bytes: [u8; 64],
    length: usize,
}

impl Text {
    fn new() -> Text {
        Text { bytes: [0; 64], length: 0 }
    }

    fn push(&mut self, more: &[u8]) -> &mut Text {
        self.bytes[self.length..self.length + more.len()].copy_from_slice(more);
        self.length += more.len();
        self
    }

    fn hex(&mut self, number: u128, digits: usize) -> &mut Text {
        let text = &mut self.bytes[self.length..self.length + digits];
        for (place, byte) in text.iter_mut().rev().enumerate() {
            *byte = b"0123456789abcdef"[(number >> (place * 4)) as usize & 15];
        }
        self.length += digits;
        self
    }

    /// B3 and Jaeger write a 64-bit id with 16 digits.
    fn trace_id(&mut self, id: u128) -> &mut Text {
        self.hex(id, if id >> 64 == 0 { 16 } else { 32 })
    }

    fn value(&self) -> HeaderValue {
        // Digits and separators only: always a valid value.
        let value = HeaderValue::from_bytes(&self.bytes[..self.length]);
        let mut value = value.unwrap_or(HeaderValue::from_static(""));
        // Never the same twice. In HTTP/2's table of fields (RFC 7541 7.1.3) it would push out those that are.
        value.set_sensitive(true);
        value
    }
}

#[cfg(test)]
mod tests;
