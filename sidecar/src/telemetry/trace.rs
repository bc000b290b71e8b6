//! The trace that a request belongs to: its ids, and whether it is recorded.
//!
//! Follows [Trace Context](https://www.w3.org/TR/trace-context/) sections 3.2 and 4 and the OpenTelemetry
//! samplers (`OTEL_TRACES_SAMPLER`). A [`TraceContext`] is small and `Copy`; making one allocates nothing.
//! Reading it from headers and writing it into them is the business of `propagation`.

use std::fmt;

/// One span's place in a trace: what is passed on to whoever is called next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; 0 only in a context [of a caller](TraceContext::of_caller) that named none. A value below 2^64 came
    /// from a caller with 64-bit ids and is written as such.
    pub trace_id: u128,
    /// The span itself; 0 only together with the trace.
    pub span_id: u64,
    /// The span above it; 0 where the trace begins here.
    pub parent_id: u64,
    /// Was the span above made by another process?
    pub parent_is_remote: bool,
    /// Are the spans of this trace exported?
    pub sampled: bool,
    /// B3 and Jaeger: a caller demanded that the trace be recorded; passed on.
    pub debug: bool,
    /// Did the caller say whether to record? Else a negative decision is ours alone.
    pub decided: bool,
    /// The header formats that the caller used, which are passed on.
    pub formats: Formats,
    /// Those of them that left the decision open, and go on leaving it open.
    pub undecided: Formats,
}

/// What a caller's headers said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Incoming {
    /// The caller's span, where its headers were valid.
    pub parent: Option<Parent>,
    /// The caller's decision whether to record; none: left to us.
    pub decision: Option<bool>,
    /// B3 and Jaeger: record whatever the sampler says.
    pub debug: bool,
    /// The formats in which something valid was found.
    pub formats: Formats,
    /// Those of them that left the decision open, as B3 may.
    pub undecided: Formats,
}

/// The span of whoever called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parent {
    /// The trace; never 0.
    pub trace_id: u128,
    /// The caller's span; never 0.
    pub span_id: u64,
}

/// A set of header formats.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Formats(u8);

/// Which traces are recorded (`OTEL_TRACES_SAMPLER`, `OTEL_TRACES_SAMPLER_ARG`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Does the caller's decision win where there is one?
    pub parent_based: bool,
    /// The share of traces that is recorded, from 0 to 1.
    pub ratio: f64,
}

impl Formats {
    /// None at all.
    pub const NONE: Formats = Formats(0);
    /// `traceparent` and `tracestate`.
    pub const W3C: Formats = Formats(1);
    /// `b3`.
    pub const B3_SINGLE: Formats = Formats(2);
    /// `x-b3-traceid` and its siblings.
    pub const B3_MULTI: Formats = Formats(4);
    /// `uber-trace-id`.
    pub const JAEGER: Formats = Formats(8);
    /// All of them.
    pub const ALL: Formats = Formats(15);

    /// Those of both.
    pub const fn and(self, other: Formats) -> Formats {
        Formats(self.0 | other.0)
    }

    /// Those that are in each of the two.
    pub const fn both(self, other: Formats) -> Formats {
        Formats(self.0 & other.0)
    }

    /// Is all of the other in this one?
    pub const fn has(self, other: Formats) -> bool {
        self.0 & other.0 == other.0
    }
}

impl fmt::Debug for Formats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Formats::W3C, "w3c"),
            (Formats::B3_SINGLE, "b3"),
            (Formats::B3_MULTI, "b3multi"),
            (Formats::JAEGER, "jaeger"),
        ];
        f.debug_set()
            .entries(names.iter().filter(|(format, _)| self.has(*format)).map(|named| named.1))
            .finish()
    }
}

impl Sampler {
    /// One trace in a hundred, unless the caller decided.
    pub const DEFAULT: Sampler = Sampler { parent_based: true, ratio: 0.01 };

    /// Is the trace recorded? The same answer for the same trace id in every sidecar.
    pub fn decide(&self, incoming: &Incoming, trace_id: u128) -> bool {
        if self.parent_based {
            if incoming.debug {
                return true;
            }
            if let Some(decision) = incoming.decision {
                return decision;
            }
        }
        // As the OpenTelemetry SDKs do it: the low 63 bits of the id against a bound.
        let bound = (self.ratio.clamp(0.0, 1.0) * (1u64 << 63) as f64) as u64;
        (trace_id as u64) >> 1 < bound
    }
}

impl TraceContext {
    /// The span of a request that arrived with these headers: below the caller's, or the first of a new trace.
    pub fn begin(incoming: &Incoming, sampler: &Sampler, random: &mut fastrand::Rng) -> TraceContext {
        let trace_id = incoming.parent.map_or_else(|| new_trace_id(random), |parent| parent.trace_id);
        TraceContext {
            trace_id,
            span_id: new_span_id(random),
            parent_id: incoming.parent.map_or(0, |parent| parent.span_id),
            parent_is_remote: incoming.parent.is_some(),
            sampled: sampler.decide(incoming, trace_id),
            debug: incoming.debug,
            decided: incoming.decision.is_some(),
            formats: incoming.formats,
            undecided: incoming.undecided,
        }
    }

    /// The caller's own span, for whoever makes none: zeros where there is none either. It is shown in the access log
    /// and never written into headers.
    pub fn of_caller(incoming: &Incoming) -> TraceContext {
        let caller = incoming.parent.unwrap_or(Parent { trace_id: 0, span_id: 0 });
        TraceContext {
            trace_id: caller.trace_id,
            span_id: caller.span_id,
            parent_id: 0,
            parent_is_remote: false,
            sampled: incoming.decision == Some(true),
            debug: incoming.debug,
            decided: incoming.decision.is_some(),
            formats: incoming.formats,
            undecided: incoming.undecided,
        }
    }

    /// A span below this one in the same process.
    pub fn child(&self, random: &mut fastrand::Rng) -> TraceContext {
        TraceContext {
            span_id: new_span_id(random),
            parent_id: self.span_id,
            parent_is_remote: false,
            ..*self
        }
    }
}

/// 128 random bits; the upper half is never 0, so that nobody takes it for a 64-bit id.
fn new_trace_id(random: &mut fastrand::Rng) -> u128 {
    random.u128((1 << 64)..)
}

fn new_span_id(random: &mut fastrand::Rng) -> u64 {
    random.u64(1..)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_caller(decision: Option<bool>, debug: bool) -> Incoming {
        let parent = Some(Parent { trace_id: 7, span_id: 9 });
        Incoming { parent, decision, debug, formats: Formats::B3_SINGLE, undecided: Formats::NONE }
    }

    #[test]
    fn the_callers_decision_wins_only_in_a_parent_based_sampler() {
        let (on, off) = (Some(true), Some(false));
        let table = [
            // parent based, ratio, decision, debug => sampled
            (true, 0.0, on, false, true),
            (true, 1.0, off, false, false),
            (true, 1.0, None, false, true),
            (true, 0.0, None, false, false),
            (true, 0.0, off, true, true),
            (false, 1.0, off, false, true),
            (false, 0.0, on, true, false),
        ];
        for (parent_based, ratio, decision, debug, sampled) in table {
            let sampler = Sampler { parent_based, ratio };
            let incoming = from_caller(decision, debug);
            let context = TraceContext::begin(&incoming, &sampler, &mut fastrand::Rng::with_seed(1));
            assert_eq!(context.sampled, sampled, "{sampler:?} {incoming:?}");
            assert_eq!((context.trace_id, context.parent_id), (7, 9));
            assert!(context.parent_is_remote);
        }
    }

    #[test]
    fn a_hundredth_of_new_traces_is_recorded() {
        let mut random = fastrand::Rng::with_seed(42);
        let sampled = (0..100_000)
            .filter(|_| TraceContext::begin(&Incoming::default(), &Sampler::DEFAULT, &mut random).sampled)
            .count();
        assert!((850..1150).contains(&sampled), "{sampled} of 100000");
    }

    #[test]
    fn a_child_stays_in_the_trace() {
        let mut random = fastrand::Rng::with_seed(3);
        let root = TraceContext::begin(&Incoming::default(), &Sampler::DEFAULT, &mut random);
        assert_eq!(root.parent_id, 0);
        assert!(root.trace_id >> 64 != 0);
        let child = root.child(&mut random);
        assert_eq!((child.trace_id, child.parent_id), (root.trace_id, root.span_id));
        assert_ne!(child.span_id, root.span_id);
        assert!(!child.parent_is_remote);
    }
}
