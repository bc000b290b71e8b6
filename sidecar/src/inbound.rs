//! Room `inbound`: to be built.
