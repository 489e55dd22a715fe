//! The fields of a JSON object, each with the type that it must have. `null` is as good as absent.

use serde_json::{Map, Value};

use super::error::{ApiError, ApiResult};
use crate::json::show;

/// An object of a request's body.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// What stands before a field's name in messages: `dlf.`, or nothing.
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    /// The whole body.
    pub(super) fn of_body(body: &'a Value) -> ApiResult<Self> {
        match body {
            Value::Object(object) => Ok(Self { object, prefix: "" }),
            other => Err(ApiError::invalid(format!("expected a JSON object, found {}", show(other)))),
        }
    }

    /// The field as it is.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// The names of all fields.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// That the value of a field is of a wrong kind.
    pub(super) fn wrong(&self, name: &str, expected: &str, found: &Value) -> ApiError {
        ApiError::field(&format!("{}{name}", self.prefix), expected, show(found))
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> ApiResult<Option<T>> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(name, expected, value)),
        }
    }

    /// An object.
    pub(super) fn object(&self, name: &str, prefix: &'static str) -> ApiResult<Option<Self>> {
        self.read(name, "an object", |value| Some(Self { object: value.as_object()?, prefix }))
    }

    /// `true` or `false`; absent is `false`.
    pub(super) fn flag(&self, name: &str) -> ApiResult<bool> {
        Ok(self.read(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A string.
    pub(super) fn string(&self, name: &str) -> ApiResult<Option<&'a str>> {
        self.read(name, "a string", Value::as_str)
    }

    /// A number that is rounded to f32; the sampler checks its range.
    pub(super) fn number(&self, name: &str) -> ApiResult<Option<f32>> {
        self.read(name, "a number", |value| Some(value.as_f64()? as f32))
    }

    /// An integer from `least` to `most`.
    pub(super) fn count(&self, name: &str, least: usize, most: usize) -> ApiResult<Option<usize>> {
        let expected = if most == usize::MAX {
            format!("an integer, {least} or more")
        } else {
            format!("an integer from {least} to {most}")
        };
        self.read(name, &expected, |value| {
            let count = usize::try_from(value.as_u64()?).ok()?;
            (least..=most).contains(&count).then_some(count)
        })
    }

    /// A seed: any 64-bit integer.
    pub(super) fn seed(&self, name: &str) -> ApiResult<Option<u64>> {
        self.read(name, "an integer", |value| value.as_u64().or_else(|| value.as_i64().map(|n| n as u64)))
    }

    /// Token ids.
    pub(super) fn ids(&self, name: &str) -> ApiResult<Option<Vec<u32>>> {
        self.read(name, "a list of token ids", |value| ids(value.as_array()?))
    }

    /// A value or a list of at most `most` values, each of which `read` reads.
    pub(super) fn one_or_more<T>(
        &self,
        name: &str,
        expected: &str,
        most: usize,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> ApiResult<Option<Vec<T>>> {
        self.read(name, expected, |value| match value {
            Value::Array(list) if list.len() <= most => list.iter().map(&read).collect(),
            Value::Array(_) => None,
            one => Some(vec![read(one)?]),
        })
    }

    /// That a field is absent, or has the one value that changes nothing.
    pub(super) fn unsupported(&self, name: &str, harmless: &[Value]) -> ApiResult<()> {
        match self.get(name) {
            Some(value) if !harmless.contains(value) => {
                Err(ApiError::invalid(format!("`{name}` {} isn't supported", show(value))).about(name))
            }
            _ => Ok(()),
        }
    }
}

/// A list of token ids; `None` where an element is none.
pub(super) fn ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}
