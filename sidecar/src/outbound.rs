//! Room `outbound`: to be built.
