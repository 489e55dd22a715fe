//! Rotary position embedding: the frequencies of a position, for every rope type.
