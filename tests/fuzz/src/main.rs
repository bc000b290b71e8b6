//! One fuzzer for all targets: `WEFT_FUZZ_TARGET` names one of `targets::TARGETS`. Started by `run`.
#![no_main]

mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::chosen()(bytes));
