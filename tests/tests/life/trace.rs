//! The trace of a request over three hops, read back from an OTLP receiver: one tree, for every format of header that
//! apps pass on; and the attempts of a retry side by side.

use std::{fs::File, net::TcpListener, sync::mpsc, thread};

use nix::sched::{CloneFlags, setns};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::{Span, span::SpanKind},
};
use tokio_stream::wrappers::TcpListenerStream;
use weft_tests::{Mesh, Pod, Process, Sidecar, until};

use super::world::{World, can_run_here};

struct Collector(mpsc::Sender<Span>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let scopes = request.into_inner().resource_spans.into_iter().flat_map(|spans| spans.scope_spans);
        for span in scopes.flat_map(|scope| scope.spans) {
            let _ = self.0.send(span);
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Receives spans at port 4317 of a pod, for as long as the test's process lives.
fn receiver(pod: &Pod) -> mpsc::Receiver<Span> {
    let (sender, spans) = mpsc::channel();
    let netns = File::open(format!("/run/netns/{}", pod.netns().name())).expect("the namespace");
    // A thread of its own: its sockets are the pod's, everybody else's are not.
    let listener = thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).expect("the namespace");
        TcpListener::bind("0.0.0.0:4317").expect("port 4317")
    });
    let listener = listener.join().expect("a listener");
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            listener.set_nonblocking(true).expect("a listener");
            let incoming =
                TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).expect("tokio"));
            let service = TraceServiceServer::new(Collector(sender));
            let _ =
                tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await;
        });
    });
    spans
}

/// A sidecar that exports to the receiver.
fn sidecar(mesh: &Mesh, pod: &Pod, collector: &Pod, service: &str, flags: &[&str]) -> Sidecar {
    let endpoint = format!("http://{}:4317", collector.ipv4());
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_TRACES_SAMPLER", "parentbased_always_on"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ];
    let sidecar = mesh.start_sidecar(pod, service, flags, &variables);
    sidecar.wait_until_ready(pod);
    sidecar
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(span: &Span, name: &str) -> Option<String> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.clone()?.value? {
        Value::StringValue(text) => Some(text),
        Value::IntValue(number) => Some(number.to_string()),
        other => Some(format!("{other:?}")),
    }
}

/// The next spans, so many.
fn take(spans: &mpsc::Receiver<Span>, count: usize) -> Vec<Span> {
    let mut taken = Vec::new();
    until("the spans have come", || {
        taken.extend(spans.try_iter());
        taken.len() >= count
    });
    taken
}

fn children<'a>(spans: &'a [Span], parent: &[u8]) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.parent_span_id == parent).collect()
}

#[test]
fn three_hops_are_one_tree_in_every_format() {
    if !can_run_here() {
        return;
    }
    let mesh = Mesh::new();
    let collector = mesh.network.pod("collector");
    let spans = receiver(&collector);
    let client = mesh.network.pod("client");
    let sidecar_of_client = sidecar(&mesh, &client, &collector, "web", &[]);
    let world = World { sidecar: sidecar_of_client, client, mesh };
    let mut running: Vec<(Process, Sidecar, Pod)> = Vec::new();
    for name in ["front", "orders", "stock"] {
        let pod = world.mesh.network.pod(name);
        let app = world.start_app(&pod, name);
        let sidecar = sidecar(&world.mesh, &pod, &collector, name, &["--port", "8080", "--instance", name]);
        running.push((app, sidecar, pod));
    }
    let url = "http://front/call?next=orders,stock";
    until("all are reached", || world.call(&[url]) == ("front orders stock".to_owned(), 200));
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const PARENT: &str = "b7ad6b7169203331";
    let formats: [(&str, &[String]); 5] = [
        ("none", &[]),
        ("w3c", &[format!("traceparent: 00-{TRACE}-{PARENT}-01")]),
        ("b3", &[format!("b3: {TRACE}-{PARENT}-1")]),
        (
            "b3 multi",
            &[
                format!("x-b3-traceid: {TRACE}"),
                format!("x-b3-spanid: {PARENT}"),
                "x-b3-sampled: 1".to_owned(),
            ],
        ),
        ("jaeger", &[format!("uber-trace-id: {TRACE}:{PARENT}:0:1")]),
    ];
    for (format, headers) in formats {
        // what earlier calls left
        for _ in 0..25 {
            weft_tests::pause();
        }
        spans.try_iter().for_each(drop);
        let mut arguments = vec![url];
        headers.iter().for_each(|header| arguments.extend(["-H", header]));
        assert_eq!(world.call(&arguments), ("front orders stock".to_owned(), 200), "{format}");
        let spans = take(&spans, 9);
        assert_eq!(spans.len(), 9, "{format}: client, attempt and server of three hops: {spans:#?}");
        let trace = &spans[0].trace_id;
        assert!(spans.iter().all(|span| &span.trace_id == trace), "{format}: one trace: {spans:#?}");
        let mut parent: Vec<u8> = Vec::new();
        if format != "none" {
            assert_eq!(hex(trace), TRACE, "{format}");
            parent = 0xb7ad_6b71_6920_3331_u64.to_be_bytes().to_vec();
        }
        for hop in ["front", "orders", "stock"] {
            for kind in [SpanKind::Client, SpanKind::Internal, SpanKind::Server] {
                let below = children(&spans, &parent);
                let [span] = below[..] else { panic!("{format}, {hop}, {kind:?}: one child: {below:#?}") };
                let is_attempt = text(span, "weft.attempt").is_some();
                match kind {
                    SpanKind::Server => assert_eq!(span.kind(), kind, "{format}: {span:?}"),
                    SpanKind::Client => assert!(span.kind() == kind && span.name.contains(hop), "{span:?}"),
                    _ => assert!(is_attempt, "{format}: an attempt: {span:?}"),
                }
                parent.clone_from(&span.span_id);
            }
        }
        assert!(children(&spans, &parent).is_empty());
    }
    // An app that is gone: its sidecar refuses the stream, and every attempt is a span with number and reason.
    running[0].0.signal(nix::sys::signal::Signal::SIGKILL);
    running[0].0.wait();
    for _ in 0..25 {
        weft_tests::pause();
    }
    spans.try_iter().for_each(drop);
    assert_eq!(world.call(&["-d", "body", "http://front/"]).1, 503);
    let spans = take(&spans, 7);
    let client = spans.iter().find(|span| span.kind() == SpanKind::Client && span.parent_span_id.is_empty());
    let mut attempts = children(&spans, &client.expect("a client span").span_id);
    attempts.sort_by_key(|span| span.start_time_unix_nano);
    let numbers: Vec<_> =
        attempts.iter().map(|span| text(span, "weft.attempt").unwrap_or_default()).collect();
    assert_eq!(numbers, ["1", "2", "3"], "{spans:#?}");
    assert!(attempts.iter().all(|span| text(span, "error.type").as_deref() == Some("app_refused")));
    assert!(format!("{:?}", attempts[1].attributes).contains("unprocessed"), "{:#?}", attempts[1]);
    // What was proven before it failed stands there; and the status of an answer of ours.
    let peer = Some(weft_tests::identity("front"));
    assert!(attempts.iter().all(|span| text(span, "weft.peer.identity") == peer), "{attempts:#?}");
    assert!(attempts.iter().all(|span| text(span, "weft.tls.version").as_deref() == Some("1.3")));
    let client = client.expect("a client span");
    assert_eq!(text(client, "http.response.status_code").as_deref(), Some("503"), "{client:#?}");
}
