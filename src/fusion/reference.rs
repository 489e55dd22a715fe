//! The paper, literally, in f64: from softmaxes and the definition of KL.
