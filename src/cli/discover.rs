//! `lunplug discover`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Screen;
use super::add::chap_file;
use super::chap::ChapFile;
use super::client::{connect, timed};
use super::failure::Failure;
use super::output::{self, Format};
use crate::api::v1;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The portal to ask: 10.0.0.1, 10.0.0.1:3260, IPv6 in brackets, or a host's name; port 3260 unless given.
    #[arg(value_name = "PORTAL")]
    portal: String,
    /// The secret of lunplugd's secrets_dir that has the CHAP credentials for discovery.
    #[arg(long, value_name = "NAME", conflicts_with = "chap_file")]
    chap_secret: Option<String>,
    /// Read the CHAP credentials from a file, YAML or JSON, `-` for stdin: username, password, and for
    /// mutual CHAP username_in and password_in.
    #[arg(long, value_name = "FILE")]
    chap_file: Option<PathBuf>,
}

#[derive(Serialize)]
struct TargetView {
    target: String,
    portals: Vec<String>,
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let chap = args.chap_file.as_deref().map(chap_file).transpose()?;
    let request = v1::DiscoverTargetsRequest {
        portal: args.portal,
        chap_secret: args.chap_secret.unwrap_or_default(),
        chap: chap.as_ref().map(ChapFile::to_wire),
    };
    let mut client = connect(socket).await?;
    let answer = client.discover_targets(timed(request)).await?.into_inner();
    let view = |t: v1::DiscoveredTarget| TargetView { target: t.target, portals: t.portals };
    let targets: Vec<TargetView> = answer.targets.into_iter().map(view).collect();
    if format != Format::Table {
        return Ok(output::document(format, &targets, screen.out)?);
    }
    let rows = targets.into_iter().map(|t| vec![t.target, t.portals.join(",")]).collect();
    Ok(output::table(&["TARGET", "PORTALS"], rows, screen.out)?)
}
