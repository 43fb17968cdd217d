//! What a store's refusal means, in words, with the way out.

use object_store::Error;

use crate::error::CheckpointError;

/// The longest text of a store that is passed on.
const TEXT_MAX: usize = 300;

/// For `map_err`: keeps what was tried, and where.
pub(super) fn failed(operation: &'static str, url: &str) -> impl FnOnce(Error) -> CheckpointError {
    let url = url.to_owned();
    move |source| {
        let all = chain(&source);
        CheckpointError::Store { operation, url, why: explain(&source, &all), again: is_away(&all) }
    }
}

/// Whether what went wrong may be that nobody answered: where a store answered, and in a folder, such words are of a name.
fn may_be_unanswered(all: &str) -> bool {
    let is_folder = all.starts_with("Generic LocalFileSystem error");
    !is_folder
        && !all.contains("status code: ")
        && ["onnect", "dns error", "timed out"].iter().any(|text| all.contains(text))
}

/// Whether nobody answered, or one that has trouble of its own.
fn is_away(all: &str) -> bool {
    let has = |text: &&str| all.contains(*text);
    // 408 and 429 are answers of a store that has too much to do.
    if ["status code: 5", "status code: 408", "status code: 429"].iter().any(has) {
        return true;
    }
    !["169.254.", "metadata.google.internal", "CA certificates", "peer certificate", "scheme is not allowed"]
        .iter()
        .any(has)
        && may_be_unanswered(all)
}

/// What an error says, and what to do about it. `all` is its text with that of its causes.
fn explain(error: &Error, all: &str) -> String {
    let has = |text: &str| all.contains(text);
    let said = said(all);
    // The address at which clouds give credentials to their own machines.
    if has("169.254.169.254") || has("metadata.google.internal") || has("169.254.170.2") {
        return format!(
            "there are no credentials, and this machine gets none of its cloud: set AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in \
             the environment ({said})"
        );
    }
    if has("NoSuchBucket") || has("ContainerNotFound") || has("specified bucket does not exist") {
        return format!("there is no such bucket: make it, or name another ({said})");
    }
    if has("Missing AccessKeyId")
        || has("MissingAccessKeyId")
        || has("Missing SecretAccessKey")
        || has("MissingSecretAccessKey")
    {
        return format!("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together, and one is not set ({said})");
    }
    if has("No CA certificates") || has("invalid peer certificate") {
        return format!(
            "it cannot be told from others: its certificate must be by an authority that this machine knows; install \
             ca-certificates, or name a file of certificates in SSL_CERT_FILE ({said})"
        );
    }
    if has("RequestTimeTooSkewed") {
        return format!(
            "this machine's clock is wrong, and the store believes no request of it: set the clock ({said})"
        );
    }
    if has("redirect without LOCATION") {
        return format!("the bucket is in another region: set AWS_REGION to its own ({said})");
    }
    // Not every request has an error of its own for it.
    let refused = has("status code: 401") || has("status code: 403");
    match error {
        _ if refused => format!(
            "the store refuses these credentials: look at AWS_ACCESS_KEY_ID and its kin, and at what they may do with this \
             bucket ({said})"
        ),
        Error::NotFound { .. } => format!("there is no such object ({said})"),
        _ if has("URL scheme is not allowed") => {
            format!("the endpoint has no TLS: set AWS_ALLOW_HTTP=true if that is meant ({said})")
        }
        _ if may_be_unanswered(all) => {
            format!("there is no answer: is the address right (AWS_ENDPOINT_URL), and the network up? ({said})")
        }
        _ => said,
    }
}

/// The texts of an error and of all that caused it, those that only repeat what is below left out.
fn chain(error: &Error) -> String {
    let mut texts: Vec<String> = vec![error.to_string()];
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        let text = cause.to_string();
        if !texts.iter().any(|known| known.contains(&text)) {
            texts.push(text);
        }
        next = cause.source();
    }
    texts.join(": ")
}

/// What is worth passing on: the code and message of a store that answered, else the end of what was said, where the cause
/// is.
fn said(all: &str) -> String {
    let between = |start: &str, end: &str| Some(all.split_once(start)?.1.split_once(end)?.0);
    if let Some(code) = between("<Code>", "</Code>") {
        let message = between("<Message>", "</Message>").unwrap_or_default();
        return format!("{code}: {message}").chars().take(TEXT_MAX).collect();
    }
    let text: Vec<&str> = all.split_whitespace().collect();
    let text = text.join(" ");
    let skip = text.chars().count().saturating_sub(TEXT_MAX);
    let cut = if skip > 0 { "... " } else { "" };
    cut.to_owned() + &text.chars().skip(skip).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_before_a_word_of_a_name() {
        let refused = "Server returned non-2xx status code: 403 Forbidden: https://host/connect-data/run";
        assert!(!is_away(refused));
        for away in [
            "error sending request for url (http://certificate-bert/): client error (Connect)",
            "Server returned non-2xx status code: 503 Service Unavailable: slow down",
            "Server returned non-2xx status code: 429 Too Many Requests",
        ] {
            assert!(is_away(away), "{away}");
        }
        let folder = "Generic LocalFileSystem error: Unable to create file /mnt/connectome/a: No space left on device";
        assert!(!is_away(folder) && !may_be_unanswered(folder) && !may_be_unanswered(refused));
        assert!(!is_away("client error (Connect): invalid peer certificate: UnknownIssuer"));
    }
}
