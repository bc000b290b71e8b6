//! Room `drain`: to be built.
