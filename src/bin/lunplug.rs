//! lunplug: the command line of lunplugd.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::Parser;
use lunplug::cli::{Cli, Screen, run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let live = io::stderr().is_terminal();
    let mut screen = Screen { out: &mut io::stdout(), err: &mut io::stderr(), live };
    ExitCode::from(runtime.block_on(run(cli, &mut screen)) as u8)
}
