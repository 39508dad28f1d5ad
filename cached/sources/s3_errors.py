"""What S3 stores and boto3 complain of, told as problems that say how to mend them.

Owns the meaning of error codes. Pure; never shows a secret, only where credentials came from.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    IncompleteReadError,
    InvalidRegionError,
    NoCredentialsError,
    PaginationError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
    SSLError,
    SSOError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)

from cached.model import ORIGIN_CHANGED, CachedError, ErrorKind, Problem, permanent

if TYPE_CHECKING:
    import botocore.session

RETRY_S = 2.0
MAX_RETRY_AFTER_S = 3600.0

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_BAD_CREDENTIALS = {
    "AuthFailure",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
_WRONG_REGION = {
    "301",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
}
_DENIED = {"401", "403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden", "Unauthorized"}
_MISSING = {"404", "NoSuchKey", "NoSuchVersion", "NotFound", "MethodNotAllowed", "405"}
_BUSY = {
    "408",
    "429",
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_GET_CREDENTIALS = (
    "give the daemon credentials in any of the ways that boto3 knows, or set 'profile' or 'anonymous = true' "
    "in the [[source]] of this prefix"
)


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def credentials_refused(error: Exception) -> bool:
    """Whether the store knows the credentials no more, or not yet."""
    return isinstance(error, ClientError) and code_of(error) in _EXPIRED | _BAD_CREDENTIALS


def no_credentials(url: str, session: botocore.session.Session) -> CachedError:
    providers = session.get_component("credential_provider").providers
    tried = ", ".join(provider.METHOD for provider in providers)
    return permanent(
        ErrorKind.DENIED,
        "NO_CREDENTIALS",
        f"{url}: there are no credentials for S3 here; these were tried: {tried}",
        _GET_CREDENTIALS,
    )


def problem_of(error: Exception, url: str, method: str | None) -> Problem:
    """``method`` names where the credentials came from (None: nothing was signed)."""
    if isinstance(error, ClientError):
        return _answered(
            error, url, "unsigned" if method is None else f"signed with credentials of {method!r}"
        )
    if isinstance(error, BotoCoreError | ValueError) and not isinstance(error, OSError):
        found = _own(error, url)
        if found is not None:
            return found
    return _connection(error, url)


def _answered(error: ClientError, url: str, signed: str) -> Problem:
    """What the store itself said."""
    code, status = code_of(error), int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    told = str(error.response.get("Error", {}).get("Message", ""))[:200]
    # What strangers write goes to terminals and logs.
    told = "".join(sign if sign.isprintable() else " " for sign in told)
    said = f"{url}: the server answered {code or status}" + (f" ({told})" if told and told != code else "")
    if code in _BUSY or status >= 500 or status == 429:
        hint = "see the store's own log; it is asked again"
        return Problem(ErrorKind.UNAVAILABLE, "ORIGIN_UNAVAILABLE", said, hint, _retry_after_s(error))
    if code == "NoSuchBucket":
        hint = "correct the ref, or the 'endpoint' in the [[source]] of this prefix"
        return Problem(ErrorKind.NOT_FOUND, "NO_SUCH_BUCKET", f"{url}: there is no such bucket", hint)
    if code in _EXPIRED:
        hint = "renew them where they come from; the daemon finds them anew at the next request"
        return Problem(ErrorKind.DENIED, "CREDENTIALS_EXPIRED", f"{said}; it was {signed}", hint)
    if code in _BAD_CREDENTIALS:
        hint = "correct the key and the secret where they come from, and see that they are of this store"
        return Problem(ErrorKind.DENIED, "BAD_CREDENTIALS", f"{said}; it was {signed}", hint)
    if code == "RequestTimeTooSkewed":
        return Problem(
            ErrorKind.DENIED, "CLOCK_SKEW", said, "set this node's clock; signatures carry the time"
        )
    if code in _WRONG_REGION:
        return _wrong_region(error, url, said)
    if code == "InvalidObjectState":
        return Problem(ErrorKind.FAILED, "ORIGIN_ARCHIVED", said, "restore the object from its archive first")
    if code in _DENIED or status in (401, 403):
        hint = (
            "allow s3:GetObject and s3:ListBucket here; a missing object is denied as well where listing is"
        )
        return Problem(ErrorKind.DENIED, "ORIGIN_DENIED", f"{said}; it was {signed}", hint)
    if code in _MISSING:
        hint = "put it there, or take it out of SHA256SUMS"
        return Problem(ErrorKind.NOT_FOUND, "MISSING_FILE", f"{url} is missing at the origin", hint)
    return _odd(code, status, url, said)


def _odd(code: str, status: int, url: str, said: str) -> Problem:
    if code == "PreconditionFailed" or status == 412:
        message = f"{url} was changed after it was listed"
        hint = "ask again, and it is listed anew; better, write each version under a prefix of its own"
        return Problem(ErrorKind.FAILED, ORIGIN_CHANGED, message, hint)
    if code == "InvalidRange" or status == 416:
        message = f"{url} has fewer bytes than it was listed with"
        return Problem(ErrorKind.DATA_LOSS, "SIZE_MISMATCH", message, "ask again, and it is listed anew")
    if code == "InvalidBucketName":
        return Problem(ErrorKind.INVALID, "BAD_REF", said, "write s3://bucket/prefix/")
    return Problem(
        ErrorKind.FAILED, "ORIGIN_REFUSED", said, "see what the store says of it, and correct the ref"
    )


def _wrong_region(error: ClientError, url: str, said: str) -> Problem:
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    details: dict[str, str] = {**error.response.get("Error", {})}  # type: ignore[dict-item]
    region = details.get("Region") or headers.get("x-amz-bucket-region", "")
    value = f"'region = \"{region}\"'" if region else "the bucket's 'region'"
    return Problem(
        ErrorKind.FAILED,
        "WRONG_REGION",
        f"{said}: the bucket is in {region or 'another region'}",
        f"set {value} in the [[source]] of this prefix",
    )


def _own(error: BotoCoreError | ValueError, url: str) -> Problem | None:
    """What boto3 found out without asking the store; None for what the connection did."""
    said = f"{url}: {error}"[:500]
    match error:
        case ProfileNotFound():
            hint = "correct 'profile' in the [[source]] of this prefix, or add it to the AWS configuration"
            return Problem(ErrorKind.DENIED, "NO_CREDENTIALS", said, hint)
        case NoCredentialsError() | PartialCredentialsError():
            return Problem(ErrorKind.DENIED, "NO_CREDENTIALS", said, _GET_CREDENTIALS)
        case CredentialRetrievalError() | SSOError() | TokenRetrievalError() | UnauthorizedSSOTokenError():
            hint = "see to what gives the credentials: it ran, and gave none that are good now"
            return Problem(ErrorKind.DENIED, "CREDENTIALS_EXPIRED", said, hint)
        case ParamValidationError():
            told = " ".join(str(error).split())[:200]
            return Problem(ErrorKind.INVALID, "BAD_REF", f"{url}: {told}", "write s3://bucket/prefix/")
        case PaginationError():
            hint = "this server does not list as S3 does: put SHA256SUMS beside the objects"
            return Problem(ErrorKind.FAILED, "BAD_LISTING", said, hint)
        case InvalidRegionError():
            hint = "correct 'region' in the [[source]] of this prefix, or AWS_DEFAULT_REGION"
            return Problem(ErrorKind.INVALID, "BAD_SOURCE", said, hint)
        case IncompleteReadError() | ResponseStreamingError():
            hint = "see the server's log, and what is between it and this node"
            return Problem(ErrorKind.UNAVAILABLE, "ORIGIN_BROKE_OFF", said, hint, RETRY_S)
        case ValueError():
            hint = "correct 'endpoint' and 'region' in the [[source]] of this prefix"
            return Problem(ErrorKind.INVALID, "BAD_SOURCE", said, hint)
    return None


def _connection(error: Exception, url: str) -> Problem:
    if _has_cause(error, ssl.SSLCertVerificationError):
        return Problem(
            ErrorKind.DENIED,
            "ORIGIN_CERTIFICATE",
            f"{url}: the server's certificate is not trusted: {error}"[:500],
            "name the authority that signed it in AWS_CA_BUNDLE",
        )
    if isinstance(error, SSLError) and _has_cause(error, FileNotFoundError):
        return Problem(
            ErrorKind.PRECONDITION,
            "BAD_CA_BUNDLE",
            f"{url}: the file of trusted authorities is not there: {error}"[:500],
            "correct AWS_CA_BUNDLE or REQUESTS_CA_BUNDLE where the daemon runs, or take it away",
        )
    return Problem(
        ErrorKind.UNAVAILABLE,
        "ORIGIN_UNREACHABLE",
        f"{url}: {error}"[:500],
        "check that the store runs, and that this node reaches it; it is asked again",
        0.0,
    )


def _retry_after_s(error: ClientError) -> float:
    told = str(error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    return min(float(told), MAX_RETRY_AFTER_S) if told.isdecimal() else 0.0


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    for _ in range(8):
        if error is None:
            return False
        found: object = (
            getattr(error, "kwargs", {}).get("error") if isinstance(error, BotoCoreError) else None
        )
        if isinstance(error, kind) or any(isinstance(part, kind) for part in (*error.args, found)):
            return True
        error = found if isinstance(found, BaseException) else error.__cause__ or error.__context__
    return False
