//! docs/errors.md against the reasons that there are.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use lunplug::api::status;
use lunplug::cli::Exit;
use lunplug::reason::Reason;

/// A gRPC code as specifications write it.
fn code_name(code: tonic::Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

#[test]
fn every_reason_has_its_section_and_every_section_its_reason() {
    let text = include_str!("../docs/errors.md");
    let sections: BTreeMap<&str, String> = text
        .split("\n## ")
        .skip(1)
        .map(|section| section.split_once('\n').unwrap())
        .map(|(code, body)| (code, body.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect();
    for &reason in Reason::ALL {
        let code = reason.code();
        let body = sections.get(code).unwrap_or_else(|| panic!("docs/errors.md lacks ## {code}"));
        let passes = if reason.is_transient() { ", passes" } else { "" };
        let kind = format!(
            "*({}, exit code {}{passes})*",
            code_name(status::code(reason)),
            Exit::from(reason.kind()) as u8
        );
        assert!(body.contains(&kind), "{code} should have {kind}, and has: {body}");
        let remedy = format!("**What to do:** {}", reason.remedy());
        assert!(body.contains(&remedy), "{code} should have {remedy}, and has: {body}");
    }
    for code in sections.keys() {
        assert!(Reason::from_code(code).is_some(), "docs/errors.md has {code}, which is no reason");
    }
}
