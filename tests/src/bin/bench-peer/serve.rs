//! The apps: gRPC that echoes, bytes, HTTP bodies taken or left lying, and a receiver of traces (OTLP over HTTP).

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Request, Response, body::Incoming, header::HeaderMap, header::HeaderValue, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use crate::bodies::PIECE;

type Answer = Result<Response<BoxBody<Bytes, hyper::Error>>, Infallible>;

/// Serves on all four addresses and prints `serving` once it listens.
pub async fn all(grpc: &str, bytes: &str, bodies: &str, traces: &str) -> anyhow::Result<()> {
    let [grpc, bytes, bodies, traces] = [
        TcpListener::bind(grpc).await?,
        TcpListener::bind(bytes).await?,
        TcpListener::bind(bodies).await?,
        TcpListener::bind(traces).await?,
    ];
    println!("serving");
    let spans = Arc::new(AtomicU64::new(0));
    let on_grpc = accept(grpc, async |stream| {
        let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = server
            .max_concurrent_streams(1000)
            .serve_connection(TokioIo::new(stream), service_fn(echo))
            .await;
    });
    let on_bytes = accept(bytes, async |stream| drop(transfer(stream).await));
    let on_bodies = accept(bodies, async |stream| {
        let server = hyper::server::conn::http1::Builder::new();
        let _ = server.serve_connection(TokioIo::new(stream), service_fn(take)).await;
    });
    let on_traces = accept(traces, move |stream| {
        let spans = spans.clone();
        async move {
            let service = service_fn(|request| receive(request, spans.clone()));
            let server = hyper::server::conn::http1::Builder::new();
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        }
    });
    tokio::join!(on_grpc, on_bytes, on_bodies, on_traces);
    Ok(())
}

async fn accept<F: Future<Output = ()> + 'static>(
    listener: TcpListener,
    serve: impl Fn(TcpStream) -> F + Clone + 'static,
) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            spawn_local(serve(stream));
        }
    }
}

/// Every message comes back, and at the end of the stream a status. So it is a unary method and a streaming one.
async fn echo(request: Request<Incoming>) -> Answer {
    let mut status = HeaderMap::new();
    status.insert("grpc-status", HeaderValue::from_static("0"));
    let body = request.into_body().with_trailers(async move { Some(Ok(status)) });
    let mut answer = Response::new(body.boxed());
    answer.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    Ok(answer)
}

/// `down` gets bytes until it closes, `echo` its word; `up..` is read until it ends.
async fn transfer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut word = [0; 5];
    stream.read_exact(&mut word).await?;
    let mut buffer = vec![0; PIECE];
    match &word {
        b"down\n" => loop {
            stream.write_all(&buffer).await?;
        },
        b"echo\n" => stream.write_all(&word).await?,
        _ => while stream.read(&mut buffer).await? > 0 {},
    }
    Ok(())
}

/// `/stall` leaves the body lying, for ever; everything else reads it.
async fn take(request: Request<Incoming>) -> Answer {
    if request.uri().path() == "/stall" {
        let _kept = request;
        return std::future::pending().await;
    }
    let mut body = request.into_body();
    while let Some(Ok(_)) = body.frame().await {}
    Ok(text("taken"))
}

fn text(text: &str) -> Response<BoxBody<Bytes, hyper::Error>> {
    Response::new(Full::new(Bytes::from(text.to_owned())).map_err(|never| match never {}).boxed())
}

/// Counts the spans it gets; GET tells how many.
async fn receive(request: Request<Incoming>, spans: Arc<AtomicU64>) -> Answer {
    if request.method() == hyper::Method::GET {
        return Ok(text(&spans.load(Ordering::Relaxed).to_string()));
    }
    let taken = match request.into_body().collect().await.map(|body| body.to_bytes()) {
        Ok(bytes) => ExportTraceServiceRequest::decode(bytes),
        Err(_) => return Ok(text("")),
    };
    let Ok(export) = taken else {
        let mut refused = text("no spans in protobuf");
        *refused.status_mut() = hyper::StatusCode::BAD_REQUEST;
        return Ok(refused);
    };
    let scopes = export.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
    let count: usize = scopes.map(|scope| scope.spans.len()).sum();
    spans.fetch_add(count as u64, Ordering::Relaxed);
    // an empty ExportTraceServiceResponse
    Ok(text(""))
}
