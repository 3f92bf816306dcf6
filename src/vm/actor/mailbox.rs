//! What reaches a VM's task.

use std::collections::BTreeSet;

use tokio::sync::mpsc;

use crate::types::VolumeName;
use crate::vm::handler::Message;

/// Messages in their order. Checks of one kind that have ended one after the other are one message: what they
/// admit is then made durable by one transaction.
pub(super) struct Mailbox {
    messages: mpsc::Receiver<Message>,
    next: Option<Message>,
}

impl Mailbox {
    pub(super) fn new(messages: mpsc::Receiver<Message>) -> Self {
        Self { messages, next: None }
    }

    /// The next message; `None` when nobody is left who could send one.
    pub(super) async fn next(&mut self) -> Option<Message> {
        let mut message = match self.next.take() {
            Some(message) => message,
            None => self.messages.recv().await?,
        };
        while let Ok(after) = self.messages.try_recv() {
            match joined(message, after) {
                Ok(both) => message = both,
                Err(apart) => {
                    let [first, after] = *apart;
                    self.next = Some(after);
                    return Some(first);
                }
            }
        }
        Some(message)
    }
}

/// Two messages as one. Those of a set are taken on by themselves, and so are additions to which volumes that
/// leave with them make room. Of one volume the second is told what became of the first.
fn joined(first: Message, after: Message) -> Result<Message, Box<[Message; 2]>> {
    match (first, after) {
        (
            Message::RemovalsChecked { mut checked, of: None },
            Message::RemovalsChecked { checked: more, of: None },
        ) if are_others(&checked, &more, |(removal, _)| &removal.name) => {
            checked.extend(more);
            Ok(Message::RemovalsChecked { checked, of: None })
        }
        (
            Message::AddsChecked { mut checked, of: None },
            Message::AddsChecked { checked: more, of: None },
        ) if checked.iter().chain(&more).all(|(add, _)| add.leaving.is_empty())
            && are_others(&checked, &more, |(add, _)| &add.spec.name) =>
        {
            checked.extend(more);
            Ok(Message::AddsChecked { checked, of: None })
        }
        (first, after) => Err(Box::new([first, after])),
    }
}

/// Whether none of `more` is about a volume that one of `these` is about.
fn are_others<T>(these: &[T], more: &[T], name: impl Fn(&T) -> &VolumeName) -> bool {
    let names: BTreeSet<&VolumeName> = these.iter().map(&name).collect();
    !more.iter().any(|one| names.contains(name(one)))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tracing::Span;

    use super::*;
    use crate::spec::{AddOptions, RemoveOptions, volume_fixture};
    use crate::vm::facade::Wish;
    use crate::vm::handler::{Add, Asked, Removal};
    use crate::vm::plan::fc::Power;

    fn name(name: &str) -> VolumeName {
        name.parse().unwrap()
    }

    fn add(volume: &str, leaving: &[&str], of: Option<i64>) -> Message {
        let (spec, options) = (volume_fixture(volume), AddOptions::default());
        let wish = Wish::Add { spec: Box::new(spec.clone()), options: options.clone() };
        let (Asked { asker, .. }, _) = Asked::new(wish, Span::none());
        let leaving = Arc::new(leaving.iter().copied().map(name).collect());
        let add = Add { spec: Box::new(spec), options, asker, leaving };
        Message::AddsChecked { checked: vec![(add, Ok(Power::On))], of }
    }

    fn removal(volume: &str, of: Option<i64>) -> Message {
        let (name, options) = (name(volume), RemoveOptions::default());
        let wish = Wish::Remove { name: name.clone(), options };
        let (Asked { asker, .. }, _) = Asked::new(wish, Span::none());
        let removal = Removal { name, options, asker, known: None };
        Message::RemovalsChecked { checked: vec![(removal, Ok(Vec::new()))], of }
    }

    /// Of what volumes each message is that comes.
    async fn come(messages: Vec<Message>) -> Vec<String> {
        let (sender, receiver) = mpsc::channel(messages.len());
        for message in messages {
            assert!(sender.try_send(message).is_ok());
        }
        drop(sender);
        let (mut mailbox, mut came) = (Mailbox::new(receiver), Vec::new());
        while let Some(message) = mailbox.next().await {
            let names: Vec<String> = match message {
                Message::AddsChecked { checked, .. } => {
                    checked.iter().map(|(add, _)| add.spec.name.to_string()).collect()
                }
                Message::RemovalsChecked { checked, .. } => {
                    checked.iter().map(|(removal, _)| removal.name.to_string()).collect()
                }
                _ => vec!["another".into()],
            };
            came.push(names.join(" "));
        }
        came
    }

    #[tokio::test]
    async fn checks_that_have_ended_come_together_and_in_their_order() {
        let adds = ["a", "b", "c"].map(|volume| add(volume, &[], None));
        assert_eq!(come(adds.into()).await, ["a b c"]);
        let removals = ["a", "b"].map(|volume| removal(volume, None));
        assert_eq!(come(removals.into()).await, ["a b"]);
        let mixed = vec![
            removal("a", None),
            Message::Look,
            removal("b", None),
            removal("c", None),
            add("d", &[], None),
        ];
        assert_eq!(come(mixed).await, ["a", "another", "b c", "d"]);
    }

    #[tokio::test]
    async fn what_belongs_to_a_set_or_needs_anothers_place_or_end_stands_by_itself() {
        let set = vec![removal("a", Some(1)), removal("b", Some(1)), removal("c", None)];
        assert_eq!(come(set).await, ["a", "b", "c"]);
        let swap = vec![add("a", &[], None), add("b", &["x"], None), add("c", &[], None)];
        assert_eq!(come(swap).await, ["a", "b", "c"]);
        let again = vec![add("a", &[], None), add("b", &[], None), add("a", &[], None)];
        assert_eq!(come(again).await, ["a b", "a"]);
        let again = vec![removal("a", None), removal("a", None)];
        assert_eq!(come(again).await, ["a", "a"]);
    }
}
