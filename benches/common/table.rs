//! What was measured, one JSON object a line on standard output.

/// What a value is held against.
pub enum Limit {
    None,
    AtMost(f64),
}

/// Tells a value.
pub fn row(part: &str, what: &str, value: f64, unit: &str, limit: Limit) {
    let (limit, ok) = match limit {
        Limit::None => (None, None),
        Limit::AtMost(most) => (Some(most), Some(value <= most)),
    };
    let value = (value * 1000.0).round() / 1000.0;
    let line = serde_json::json!({
        "part": part, "what": what, "value": value, "unit": unit, "at_most": limit, "ok": ok,
    });
    println!("{line}");
}
