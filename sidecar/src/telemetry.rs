//! Room `telemetry`: to be built.
