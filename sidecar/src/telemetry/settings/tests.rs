use std::collections::HashMap;

use super::*;

fn read(variables: &[(&str, &str)]) -> (TraceSettings, Vec<String>) {
    let variables: HashMap<_, _> = variables.iter().copied().collect();
    TraceSettings::read(|name| variables.get(name).map(|value| (*value).to_owned()), "orders")
}

fn well(variables: &[(&str, &str)]) -> TraceSettings {
    let (settings, problems) = read(variables);
    assert!(problems.is_empty(), "{problems:?}");
    settings
}

const COLLECTOR: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318/");

#[test]
fn without_variables_nothing_is_exported() {
    let settings = well(&[]);
    assert_eq!(settings.service_name, "orders");
    assert_eq!((settings.sampler, settings.propagators), (Sampler::DEFAULT, Propagators::DEFAULT));
    assert_eq!(settings.export, None);
}

#[test]
fn samplers() {
    for (name, argument, parent_based, ratio) in [
        ("always_on", "", false, 1.0),
        ("always_off", "", false, 0.0),
        ("traceidratio", "0.25", false, 0.25),
        ("parentbased_always_on", "", true, 1.0),
        ("parentbased_always_off", "", true, 0.0),
        ("parentbased_traceidratio", "0.5", true, 0.5),
        ("parentbased_traceidratio", "", true, 1.0),
        ("", "0.5", true, 0.5),
        ("", "", true, 0.01),
    ] {
        let settings = well(&[("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", argument)]);
        assert_eq!(settings.sampler, Sampler { parent_based, ratio }, "{name} {argument}");
    }
}

#[test]
fn propagators() {
    let chosen = |text| well(&[("OTEL_PROPAGATORS", text)]).propagators;
    let only = |read, always| Propagators { read, always, ..Propagators::DEFAULT };
    let both = Formats::B3_SINGLE.and(Formats::B3_MULTI);
    assert_eq!(chosen("none"), only(Formats::NONE, Formats::NONE));
    assert_eq!(chosen("tracecontext,baggage"), only(Formats::W3C, Formats::W3C));
    assert_eq!(chosen("b3"), only(both, Formats::B3_SINGLE));
    assert_eq!(chosen(" b3multi , jaeger").always, Formats::B3_MULTI.and(Formats::JAEGER));
}

#[test]
fn endpoints() {
    let export = |variables: &[(&str, &str)]| well(variables).export.unwrap();
    let general = export(&[COLLECTOR]);
    assert_eq!(general.endpoint, "http://127.0.0.1:4318/v1/traces");
    assert_eq!(general.protocol, OtlpProtocol::HttpProtobuf);
    assert_eq!((general.queue, general.batch, general.delay), (2048, 512, Duration::from_secs(5)));
    let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:1/own");
    assert_eq!(export(&[COLLECTOR, traces]).endpoint, "http://c:1/own");
    let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
    assert_eq!(export(&[COLLECTOR, grpc]).endpoint, COLLECTOR.1);
    let bare = [("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4317"), ("OTEL_EXPORTER_OTLP_INSECURE", "true"), grpc];
    assert_eq!(export(&bare).endpoint, "http://c:4317");
    let json = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json");
    assert_eq!(export(&[COLLECTOR, grpc, json]).protocol, OtlpProtocol::HttpJson);
    let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x, tenant = a");
    let expected = [("authorization", "Bearer x"), ("tenant", "a")];
    assert_eq!(export(&[COLLECTOR, headers]).headers, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
}

#[test]
fn exporting_can_be_switched_off() {
    for off in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
        assert_eq!(well(&[COLLECTOR, off]).export, None);
    }
}

#[test]
fn the_resource_names_the_service() {
    let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=web,deployment.environment=a%2Cb");
    let settings = well(&[attributes]);
    assert_eq!(settings.service_name, "web");
    assert_eq!(settings.resource, [("deployment.environment".to_owned(), "a,b".to_owned())]);
    assert_eq!(well(&[attributes, ("OTEL_SERVICE_NAME", "shop")]).service_name, "shop");
}

#[test]
fn each_unusable_value_is_named() {
    let (settings, problems) = read(&[
        COLLECTOR,
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_PROPAGATORS", "tracecontext,xray"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
    ]);
    for name in ["SAMPLER", "PROPAGATORS", "PROTOCOL", "QUEUE_SIZE", "TIMEOUT", "HEADERS"] {
        assert_eq!(
            problems.iter().filter(|problem| problem.contains(name)).count(),
            1,
            "{name}: {problems:?}"
        );
    }
    assert!(!problems.iter().any(|problem| problem.contains("secret")));
    assert_eq!(settings.export.unwrap().queue, 2048);
    for endpoint in ["https://c:4318", "c:4318", "http://", "not a url"] {
        let (settings, problems) = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)]);
        assert_eq!((settings.export, problems.len()), (None, 1), "{endpoint}");
    }
}
